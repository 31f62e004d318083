/* Blocks of 32 x 32 in bfloat16 with matrix tiles (Intel AMX).
 *
 * A tile holds 16 rows of 64 bytes: 16 x 32 bfloat16 on the left of a product, 32 x 16 in pairs of rows on its right,
 * 16 x 16 float as its sum.
 */

#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t T;

#define TILE 512 /* elements of a tile on the left or right */

/* Whether this process may use tiles: Linux grants their registers on request. */
int blocks(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

typedef struct {
    uint8_t bytes[64];
} Setting;

/* Tiles 0 to 7 of 16 rows of 64 bytes; -> what was set before, which other libraries may count on. */
static Setting begin(void) {
    Setting before, ours;
    _tile_storeconfig(&before);
    memset(&ours, 0, sizeof ours);
    ours.bytes[0] = 1;
    for (int i = 0; i < 8; i++) {
        ours.bytes[16 + 2 * i] = 64;
        ours.bytes[48 + i] = 16;
    }
    _tile_loadconfig(&ours);
    return before;
}

static void end(const Setting *before) {
    if (before->bytes[0])
        _tile_loadconfig(before);
    else
        _tile_release();
}

static inline __m512 load16(const T *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

static inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline void store16(T *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, narrowed(x)); }

/* The two operands of `product`. */
typedef struct {
    const T *at;
    int64_t row;
} Left;

typedef struct {
    const T *at;
    int64_t next, step; /* from the first 16 columns to the others; from 32 rows to the next 32 */
} Right;

/* to [32, 32] = left right, or += */
static inline void product(float *to, int64_t stride, int add, Left left, Right right, int64_t depth) {
    __asm__ volatile("" ::: "memory"); /* what was written is in memory before a tile reads it */
    if (add) {
        _tile_loadd(0, to, 4 * stride);
        _tile_loadd(1, to + 16, 4 * stride);
        _tile_loadd(2, to + 16 * stride, 4 * stride);
        _tile_loadd(3, to + 16 * stride + 16, 4 * stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < depth; i += 32) {
        _tile_loadd(4, left.at, 2 * left.row);
        _tile_loadd(6, right.at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right.at + right.next, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left.at + 16 * left.row, 2 * left.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        left.at += 32;
        right.at += right.step;
    }
    _tile_stored(0, to, 4 * stride);
    _tile_stored(1, to + 16, 4 * stride);
    _tile_stored(2, to + 16 * stride, 4 * stride);
    _tile_stored(3, to + 16 * stride + 16, 4 * stride);
    __asm__ volatile("" ::: "memory");
}

static inline Left left_rows(const T *rows, int64_t stride) { return (Left){rows, stride}; }

/* Rows [filled, d] turned, to be on the left: to [d, filled] */
static void turn_left(const T *rows, int64_t filled, int64_t d, T *to) {
    for (int64_t i = 0; i < filled; i += 32)
        for (int64_t c = 0; c < d; c++)
            for (int64_t r = 0; r < 32; r++)
                to[c * filled + i + r] = rows[(i + r) * d + c];
}

static inline Left left_turned(const T *turned, int64_t component, int64_t row, int64_t filled, int64_t d) {
    (void)d;
    return (Left){turned + component * filled + row, filled};
}

/* Rows [filled, d] turned, to be on the right: for each 16 rows, each 32 components: [16 pairs of components, 16 rows] */
static void turn_right(const T *rows, int64_t filled, int64_t d, T *to) {
    const __m512i apart = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32((int)(d / 2)));
    for (int64_t i = 0; i < filled; i += 16)
        for (int64_t pair = 0; pair < d / 2; pair++, to += 32)
            _mm512_storeu_si512(to, _mm512_i32gather_epi32(apart, (const int *)(rows + i * d) + pair, 4));
}

static inline Right right_turned(const T *turned, int64_t row, int64_t filled, int64_t d) {
    (void)filled;
    return (Right){turned + row * d, d / 32 * TILE, TILE};
}

static inline __m512i interleaved(__m256i even, __m256i odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
}

/* Rows [filled, d], to be on the right: for each 32 rows, each 16 components: [16 pairs of rows, 16 components] */
static void pack_right(const T *rows, int64_t filled, int64_t d, T *to) {
    for (int64_t i = 0; i < filled; i += 32)
        for (int64_t c = 0; c < d; c += 16)
            for (int64_t r = 0; r < 32; r += 2, to += 32) {
                const __m256i *even = (const __m256i *)(rows + (i + r) * d + c);
                const __m256i *odd = (const __m256i *)(rows + (i + r + 1) * d + c);
                _mm512_storeu_si512(to, interleaved(_mm256_loadu_si256(even), _mm256_loadu_si256(odd)));
            }
}

static inline Right right_rows(const T *packed, int64_t row, int64_t component, int64_t d) {
    return (Right){packed + row * d + component * 32, TILE, d / 16 * TILE};
}

/* Two rows of 16 of dS [STRIP, PANEL], to be on the right too: for each 16 columns, each 32 rows: [16 pairs, 16] */
static inline void keep_two(T *packed, int64_t row, int64_t column, __m512 even, __m512 odd) {
    T *to = packed + (column / 16 * (STRIP / 32) + row / 32) * TILE + row % 32 * 16;
    _mm512_storeu_si512(to, interleaved(narrowed(even), narrowed(odd)));
}

static inline void keep_none(T *packed, int64_t row, int64_t column) { /* a block of 32 x 32 */
    for (int64_t c = column; c < column + 32; c += 16)
        memset(packed + (c / 16 * (STRIP / 32) + row / 32) * TILE, 0, 2 * TILE);
}

static inline Right right_kept(const T *ds, const T *packed, int64_t column) {
    (void)ds;
    return (Right){packed + column / 16 * (STRIP / 32) * TILE, STRIP / 32 * TILE, TILE};
}
