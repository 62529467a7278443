// Products with weights that are packed once.

#include "common.h"

extern "C" {

// The weight [outputs][inputs], inputs even, to panels [inputs / 2][PANEL][2], from output `start` of them on, which is
// a multiple of 16; what the last panel lacks stays as it is.
void pack(const uint16_t* weight, uint16_t* packed, long start, long outputs, long inputs, int threads) {
    const long pairs = inputs / 2, groups = (outputs + 15) / 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long g = 0; g < groups; g++)
        pack_group(weight + 16 * g * inputs, inputs, outputs - 16 * g, pairs, start + 16 * g, packed);
}

// y [rows][outputs] = x [rows][inputs] W^T + bias, of a packed W; x lies x_stride apart, y without gaps.
void multiply(const uint16_t* x, long x_stride, const uint16_t* packed, const uint16_t* bias, uint16_t* y, long rows,
              long outputs, long inputs, int threads) {
    if (rows <= 0) return;
    const long pairs = inputs / 2, panels = (outputs + PANEL - 1) / PANEL, size = pairs * 2 * PANEL;
    const long wanted = std::max(1L, std::min(4L * threads / panels, rows / (8 * ROWS)));
    const long block = ((rows + wanted - 1) / wanted + ROWS - 1) / ROWS * ROWS, blocks = (rows + block - 1) / block;
    const long sweeps = (std::min(rows, block) + ROWS - 1) / ROWS;
    const long share = sweeps < 3 ? 0 : sweeps == 3 ? 128 : 64;  // the first sweep reads its own panel from memory
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long task = 0; task < panels * blocks; task++) {
        const long p = task / blocks, stop = std::min(rows, (task % blocks + 1) * block);
        const uint16_t* panel = packed + p * size;
        const char* ahead = (const char*)(packed + std::min(p + threads, panels - 1) * size);
        const char* end = ahead + size * (long)sizeof(uint16_t);
        for (long start = task % blocks * block, sweep = 0; start < stop; start += ROWS, sweep++) {
            const long bytes = blocks == 1 && sweep && ahead < end ? share : 0;
            TILES[std::min(ROWS, stop - start)](x + start * x_stride, x_stride, panel, pairs,
                                                bias ? bias + p * PANEL : nullptr, y + start * outputs + p * PANEL,
                                                outputs, outputs - p * PANEL, Ahead{ahead, bytes});
            ahead += bytes * pairs;
        }
    }
}
}
