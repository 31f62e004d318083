/* Blocks of 32 x 32 in float with vectors of 16: the same functions as `native_tiles.h`. */

typedef float T;

int blocks(void) { return 1; }

typedef int Setting;

static Setting begin(void) { return 0; }

static void end(const Setting *before) { (void)before; }

static inline __m512 load16(const T *p) { return _mm512_loadu_ps(p); }

static inline void store16(T *p, __m512 x) { _mm512_storeu_ps(p, x); }

typedef struct {
    const T *at;
    int64_t row, column;
} Left;

typedef struct {
    const T *at;
    int64_t row;
} Right;

/* to [32, 32] = left right, or +=; eight rows at a time stay in registers */
static inline void product(float *to, int64_t stride, int add, Left left, Right right, int64_t depth) {
    for (int64_t i = 0; i < 32; i += 8) {
        __m512 sums[8][2];
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int c = 0; c < 2; c++)
                sums[r][c] = _mm512_setzero_ps();
        const T *one = left.at + i * left.row, *other = right.at;
        for (int64_t k = 0; k < depth; k++, one += left.column, other += right.row) {
            __m512 first = _mm512_loadu_ps(other), second = _mm512_loadu_ps(other + 16);
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                __m512 value = _mm512_set1_ps(one[r * left.row]);
                sums[r][0] = _mm512_fmadd_ps(value, first, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(value, second, sums[r][1]);
            }
        }
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int c = 0; c < 2; c++) {
                float *place = to + (i + r) * stride + 16 * c; /* summed apart: long sums round less */
                _mm512_storeu_ps(place, add ? _mm512_add_ps(_mm512_loadu_ps(place), sums[r][c]) : sums[r][c]);
            }
    }
}

static inline Left left_rows(const T *rows, int64_t stride) { return (Left){rows, stride, 1}; }

/* Rows [filled, d] turned, to be on the left: they are read by columns as they are. */
static void turn_left(const T *rows, int64_t filled, int64_t d, T *to) { memcpy(to, rows, sizeof(T) * filled * d); }

static inline Left left_turned(const T *rows, int64_t component, int64_t row, int64_t filled, int64_t d) {
    (void)filled;
    return (Left){rows + row * d + component, 1, d};
}

/* Rows [filled, d] turned, to be on the right: to [d, filled] */
static void turn_right(const T *rows, int64_t filled, int64_t d, T *to) {
    const __m512i apart = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32((int)d));
    for (int64_t i = 0; i < filled; i += 16)
        for (int64_t c = 0; c < d; c++)
            _mm512_storeu_ps(to + c * filled + i, _mm512_i32gather_ps(apart, rows + i * d + c, 4));
}

static inline Right right_turned(const T *turned, int64_t row, int64_t filled, int64_t d) {
    (void)d;
    return (Right){turned + row, filled};
}

/* Rows [filled, d], to be on the right */
static void pack_right(const T *rows, int64_t filled, int64_t d, T *to) { memcpy(to, rows, sizeof(T) * filled * d); }

static inline Right right_rows(const T *packed, int64_t row, int64_t component, int64_t d) {
    return (Right){packed + row * d + component, d};
}

/* dS [STRIP, PANEL], to be on the right too: as it is, nothing else is kept. */
static inline void keep_two(T *packed, int64_t row, int64_t column, __m512 even, __m512 odd) {
    (void)packed, (void)row, (void)column, (void)even, (void)odd;
}

static inline void keep_none(T *packed, int64_t row, int64_t column) { (void)packed, (void)row, (void)column; }

static inline Right right_kept(const T *ds, const T *packed, int64_t column) {
    (void)packed;
    return (Right){ds + column, PANEL};
}
