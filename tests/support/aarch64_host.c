/* Runs functions of the kernels for a process of another architecture, whose arena it maps.  A
 * record on stdin is the number of a function and its 16 arguments; one on stdout is its result. */
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int64_t Word;
typedef Word (*Function)(
    Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word);

#define F(name) extern Word name();
FUNCTIONS
#undef F
#define F(name) (Function)name,
static const Function functions[] = {FUNCTIONS};

int main(int count, char **arguments)
{
    char *address = (char *)strtoull(arguments[1], 0, 0);
    size_t size = strtoull(arguments[2], 0, 0);
    if (mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE,
             atoi(arguments[3]), 0) != address)
        return 1;
    for (struct { Word function, a[16]; } call; read(0, &call, sizeof call) == sizeof call;) {
        Word *a = call.a, result = functions[call.function](
            a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
            a[14], a[15]);
        if (write(1, &result, sizeof result) != sizeof result)
            return 1;
    }
    return count < 0;
}
