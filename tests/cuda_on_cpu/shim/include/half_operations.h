// The functions and operators that float16 and bfloat16 have in common.  Each computes in float and
// rounds once, which for +, -, *, / gives the correctly rounded result.
#pragma once

#define EMU_HALF_BINARY(H, H2, name, result)                                                    \
  EMU_FUNCTION H name(H a, H b) { return H(result((float)a, (float)b)); }                       \
  EMU_FUNCTION H2 name##2(H2 a, H2 b) { return {name(a.x, b.x), name(a.y, b.y)}; }
#define EMU_ADD(a, b) ((a) + (b))
#define EMU_SUB(a, b) ((a) - (b))
#define EMU_MUL(a, b) ((a) * (b))
#define EMU_DIV(a, b) ((a) / (b))

#define EMU_HALF_COMPARISON(H, name, op) \
  EMU_FUNCTION bool name(H a, H b) { return (float)a op (float)b; } \
  EMU_FUNCTION bool operator op(H a, H b) { return (float)a op (float)b; }

#define EMU_HALF_OPERATOR(H, H2, op, name)                                \
  EMU_FUNCTION H operator op(H a, H b) { return name(a, b); }             \
  EMU_FUNCTION H2 operator op(H2 a, H2 b) { return name##2(a, b); }       \
  EMU_FUNCTION H& operator op##=(H& a, H b) { return a = name(a, b); }    \
  EMU_FUNCTION H2& operator op##=(H2& a, H2 b) { return a = name##2(a, b); }

#define EMU_HALF_UNARY(H, H2, name, h2name, expression)             \
  EMU_FUNCTION H name(H h) {                                        \
    float x = h;                                                    \
    return H(expression);                                           \
  }                                                                 \
  EMU_FUNCTION H2 h2name(H2 h) { return {name(h.x), name(h.y)}; }

#define EMU_HALF_OPERATIONS(H, H2)                                                              \
  EMU_HALF_BINARY(H, H2, __hadd, EMU_ADD)                                                       \
  EMU_HALF_BINARY(H, H2, __hsub, EMU_SUB)                                                       \
  EMU_HALF_BINARY(H, H2, __hmul, EMU_MUL)                                                       \
  EMU_HALF_BINARY(H, H2, __hmax, fmaxf)                                                         \
  EMU_HALF_BINARY(H, H2, __hmin, fminf)                                                         \
  EMU_FUNCTION H __hdiv(H a, H b) { return H((float)a / (float)b); }                            \
  EMU_FUNCTION H2 __h2div(H2 a, H2 b) { return {__hdiv(a.x, b.x), __hdiv(a.y, b.y)}; }          \
  EMU_FUNCTION H __hfma(H a, H b, H c) { return emu_fma(a, b, c); }                             \
  EMU_FUNCTION H2 __hfma2(H2 a, H2 b, H2 c) {                                                   \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                      \
  }                                                                                             \
  EMU_HALF_OPERATOR(H, H2, +, __hadd)                                                           \
  EMU_HALF_OPERATOR(H, H2, -, __hsub)                                                           \
  EMU_HALF_OPERATOR(H, H2, *, __hmul)                                                           \
  EMU_FUNCTION H operator/(H a, H b) { return __hdiv(a, b); }                                   \
  EMU_FUNCTION H operator-(H h) { return H(-(float)h); }                                        \
  EMU_HALF_COMPARISON(H, __hlt, <)                                                              \
  EMU_HALF_COMPARISON(H, __hle, <=)                                                             \
  EMU_HALF_COMPARISON(H, __hgt, >)                                                              \
  EMU_HALF_COMPARISON(H, __hge, >=)                                                             \
  EMU_HALF_COMPARISON(H, __heq, ==)                                                             \
  EMU_HALF_COMPARISON(H, __hne, !=)                                                             \
  EMU_FUNCTION bool __hisnan(H h) { return isnan((float)h); }                                   \
  EMU_HALF_UNARY(H, H2, __habs, __habs2, fabsf(x))                                              \
  EMU_HALF_UNARY(H, H2, __hneg, __hneg2, -x)                                                    \
  EMU_HALF_UNARY(H, H2, hexp, h2exp, expf(x))                                                   \
  EMU_HALF_UNARY(H, H2, hexp2, h2exp2, exp2f(x))                                                \
  EMU_HALF_UNARY(H, H2, hrcp, h2rcp, 1.0f / x)                                                  \
  EMU_HALF_UNARY(H, H2, hsqrt, h2sqrt, sqrtf(x))                                                \
  EMU_HALF_UNARY(H, H2, hrsqrt, h2rsqrt, 1.0f / sqrtf(x))                                       \
  EMU_FUNCTION float __low2float(H2 h) { return h.x; }                                          \
  EMU_FUNCTION float __high2float(H2 h) { return h.y; }
