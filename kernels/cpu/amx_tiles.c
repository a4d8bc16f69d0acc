#ifdef TIER_AMX
#include "amx_tiles.h"

#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int request_amx(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0;
}

void configure_amx_tiles(int rows)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {0}};
    memset(config.rows, rows, 6);
    config.rows[6] = config.rows[7] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory"); /* gcc knows only of 8 bytes */
    _tile_loadconfig(&config);
}

#endif
