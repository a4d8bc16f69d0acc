// float2, int4 and the other vector types, with the alignment of CUDA.
#pragma once

#define EMU_VECTOR2(name, T, alignment)                      \
  struct alignas(alignment) name {                           \
    T x, y;                                                  \
  };                                                         \
  EMU_FUNCTION name make_##name(T x, T y) { return {x, y}; }
#define EMU_VECTOR3(name, T)                                           \
  struct name {                                                        \
    T x, y, z;                                                         \
  };                                                                   \
  EMU_FUNCTION name make_##name(T x, T y, T z) { return {x, y, z}; }
#define EMU_VECTOR4(name, T, alignment)                                         \
  struct alignas(alignment) name {                                              \
    T x, y, z, w;                                                               \
  };                                                                            \
  EMU_FUNCTION name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTOR2(char2, signed char, 2)
EMU_VECTOR4(char4, signed char, 4)
EMU_VECTOR2(uchar2, unsigned char, 2)
EMU_VECTOR4(uchar4, unsigned char, 4)
EMU_VECTOR2(short2, short, 4)
EMU_VECTOR4(short4, short, 8)
EMU_VECTOR2(ushort2, unsigned short, 4)
EMU_VECTOR4(ushort4, unsigned short, 8)
EMU_VECTOR2(int2, int, 8)
EMU_VECTOR3(int3, int)
EMU_VECTOR4(int4, int, 16)
EMU_VECTOR2(uint2, unsigned, 8)
EMU_VECTOR4(uint4, unsigned, 16)
EMU_VECTOR2(longlong2, long long, 16)
EMU_VECTOR2(ulonglong2, unsigned long long, 16)
EMU_VECTOR2(float2, float, 8)
EMU_VECTOR3(float3, float)
EMU_VECTOR4(float4, float, 16)
EMU_VECTOR2(double2, double, 16)
