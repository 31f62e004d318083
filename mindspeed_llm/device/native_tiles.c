/* Causal attention in bfloat16 on a CPU with matrix tiles (Intel AMX): scores never leave the core's cache.
 *
 * Compiled at first use by `native.py`; elsewhere `tiles` says that it is not there. A tile holds 16 rows of 64 bytes:
 * 16 x 32 bfloat16 on the left of a product, 32 x 16 in pairs of rows on its right, 16 x 16 float as its sum. P and dS
 * are rounded to bfloat16 as operands; scores, dP and all sums are float.
 *
 * Shapes: `rows` batch, n query heads, g key heads, t tokens, d head dimension, a multiple of 32. A segment is a run of
 * tokens that see each other; bounds [segments + 1] says where each begins. Strides count elements, of (row, head,
 * token); components lie side by side.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(BF16) && defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK 32        /* queries or keys of a block: two tiles */
#define STRIP 64        /* keys whose gradients are summed at a time */
#define PANEL 512       /* queries they are summed over at a time */
#define TILE 512        /* bfloat16 elements of a tile */
#define ALIGNED(bytes) (((bytes) + 63) / 64 * 64)

typedef uint16_t bf16;

typedef struct {
    int64_t row, head, token;
} Strides;

static inline int64_t place(const Strides *one, int64_t row, int64_t head, int64_t token) {
    return row * one->row + head * one->head + token * one->token;
}

/* Whether this process may use tiles: the kernel grants their registers on request. */
int tiles(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

/* Tiles 0 to 7 of 16 rows of 64 bytes; -> what was set before, which other libraries may count on. */
typedef struct {
    uint8_t bytes[64];
} Setting;

static Setting set_tiles(void) {
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

static void restore_tiles(const Setting *before) {
    if (before->bytes[0])
        _tile_loadconfig(before);
    else
        _tile_release();
}

/* Tiles 0 to 3 are the sum of a block of 32 x 32: upper left, upper right, lower left, lower right. */
static inline void clear_block(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void load_block(const float *from, int64_t stride) {
    __asm__ volatile("" ::: "memory"); /* what was written to memory is there before a tile reads it */
    _tile_loadd(0, from, 4 * stride);
    _tile_loadd(1, from + 16, 4 * stride);
    _tile_loadd(2, from + 16 * stride, 4 * stride);
    _tile_loadd(3, from + 16 * stride + 16, 4 * stride);
}

static inline void store_block(float *to, int64_t stride) {
    _tile_stored(0, to, 4 * stride);
    _tile_stored(1, to + 16, 4 * stride);
    _tile_stored(2, to + 16 * stride, 4 * stride);
    _tile_stored(3, to + 16 * stride + 16, 4 * stride);
    __asm__ volatile("" ::: "memory");
}

/* Add left [32, 32 steps] (rows `stride` apart) times right, two columns of tiles whose next lies `step` further. */
static inline void add_products(const bf16 *left, int64_t stride, const bf16 *right, const bf16 *other, int64_t step,
                                int64_t steps) {
    __asm__ volatile("" ::: "memory");
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, left, 2 * stride);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, other, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * stride, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        left += 32;
        right += step;
        other += step;
    }
}

static inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

static inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* e^x, to about a unit in the last place; 0 where it would be below the least float. */
static inline __m512 exponentials(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x); /* in this order NaN stays NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), f);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.3981999507e-3f), f, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, f), f, f);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}

/* to [filled, d], the t rows of `from` and zeros behind them */
static void copy_rows(const bf16 *from, int64_t stride, int64_t t, int64_t filled, int64_t d, bf16 *to) {
    for (int64_t i = 0; i < t; i++)
        memcpy(to + i * d, from + i * stride, 2 * d);
    memset(to + t * d, 0, 2 * (filled - t) * d);
}

/* Right operand of a product with rows' transpose: for each 16 rows, each 32 components: [16 pairs of components, 16
 * rows] */
static void pack_transposed(const bf16 *rows, int64_t filled, int64_t d, bf16 *to) {
    const __m512i apart =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32((int)(d / 2)));
    for (int64_t i = 0; i < filled; i += 16)
        for (int64_t pair = 0; pair < d / 2; pair++, to += 32)
            _mm512_storeu_si512(to, _mm512_i32gather_epi32(apart, (const int *)(rows + i * d) + pair, 4));
}

static inline __m512i interleaved(__m256i even, __m256i odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
}

/* Right operand of a product with the rows themselves: for each 32 rows, each 16 components: [16 pairs of rows, 16
 * components] */
static void pack_pairs(const bf16 *rows, int64_t filled, int64_t d, bf16 *to) {
    for (int64_t i = 0; i < filled; i += 32)
        for (int64_t c = 0; c < d; c += 16)
            for (int64_t r = 0; r < 32; r += 2, to += 32) {
                const bf16 *pair = rows + (i + r) * d + c;
                __m256i even = _mm256_loadu_si256((const __m256i *)pair);
                __m256i odd = _mm256_loadu_si256((const __m256i *)(pair + d));
                _mm512_storeu_si512(to, interleaved(even, odd));
            }
}

/* to [d, filled] */
static void transpose(const bf16 *rows, int64_t filled, int64_t d, bf16 *to) {
    for (int64_t i = 0; i < filled; i += 32)
        for (int64_t c = 0; c < d; c++)
            for (int64_t r = 0; r < 32; r++)
                to[c * filled + i + r] = rows[(i + r) * d + c];
}

/* One block of memory, cut into pieces. */
static void *piece(char **at, int64_t bytes) {
    void *found = *at;
    *at += ALIGNED(bytes);
    return found;
}

/* p [32, keys] = exp(scale scores - peak) where key <= query, 0 elsewhere; scores [32, keys] */
static void softmax_block(const float *scores, bf16 *p, int64_t width, int64_t keys, float scale, float *peaks,
                          float *sums) {
    for (int64_t r = 0; r < BLOCK; r++) {
        const float *row = scores + r * width;
        bf16 *to = p + r * width;
        int64_t seen = keys - BLOCK + r + 1, whole = seen / 16 * 16;
        __mmask16 rest = (__mmask16)((1u << (seen - whole)) - 1);
        __m512 by = _mm512_set1_ps(scale), low = _mm512_set1_ps(-INFINITY);
        __m512 peak = _mm512_mask_mul_ps(low, rest, _mm512_loadu_ps(row + (rest ? whole : 0)), by);
        for (int64_t j = 0; j < whole; j += 16)
            peak = _mm512_max_ps(peak, _mm512_mul_ps(_mm512_loadu_ps(row + j), by));
        peaks[r] = _mm512_reduce_max_ps(peak);
        peak = _mm512_set1_ps(peaks[r]);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < keys; j += 16) {
            __m512 weight = exponentials(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), by, peak));
            if (j >= whole)
                weight = _mm512_maskz_mov_ps(j == whole ? rest : 0, weight);
            sum = _mm512_add_ps(sum, weight);
            _mm256_storeu_si256((__m256i *)(to + j), narrowed(weight));
        }
        sums[r] = _mm512_reduce_add_ps(sum);
    }
}

/* One head of one segment: out = softmax(scale q k^T) v, log_sums [t] */
static void head_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *log_sums, int64_t t, int64_t d,
                         const Strides *strides, float scale, char *scratch) {
    int64_t filled = (t + BLOCK - 1) / BLOCK * BLOCK, chunks = d / 32;
    bf16 *rows = piece(&scratch, 2 * filled * d), *keys = piece(&scratch, 2 * filled * d);
    bf16 *values = piece(&scratch, 2 * filled * d), *p = piece(&scratch, 2 * BLOCK * filled);
    float *scores = piece(&scratch, 4 * BLOCK * filled);
    float peaks[BLOCK], sums[BLOCK], made[BLOCK * BLOCK];
    copy_rows(k, strides[1].token, t, filled, d, rows);
    pack_transposed(rows, filled, d, keys);
    copy_rows(v, strides[2].token, t, filled, d, rows);
    pack_pairs(rows, filled, d, values);
    copy_rows(q, strides[0].token, t, filled, d, rows);
    for (int64_t i = 0; i < filled; i += BLOCK) {
        int64_t seen = i + BLOCK, wanted = t - i < BLOCK ? t - i : BLOCK;
        for (int64_t j = 0; j < seen; j += BLOCK) {
            const bf16 *right = keys + j / 16 * chunks * TILE;
            clear_block();
            add_products(rows + i * d, d, right, right + chunks * TILE, TILE, chunks);
            store_block(scores + j, filled);
        }
        softmax_block(scores, p, filled, seen, scale, peaks, sums);
        for (int64_t c = 0; c < d; c += 32) {
            const bf16 *right = values + c / 16 * TILE;
            clear_block();
            add_products(p, filled, right, right + TILE, d / 16 * TILE, seen / 32);
            store_block(made, BLOCK);
            for (int64_t r = 0; r < wanted; r++) {
                __m512 by = _mm512_set1_ps(1.0f / sums[r]);
                bf16 *to = out + (i + r) * strides[3].token + c;
                for (int64_t l = 0; l < 32; l += 16)
                    _mm256_storeu_si256((__m256i *)(to + l),
                                        narrowed(_mm512_mul_ps(_mm512_loadu_ps(made + r * BLOCK + l), by)));
            }
        }
        for (int64_t r = 0; r < wanted; r++)
            log_sums[i + r] = peaks[r] + logf(sums[r]);
    }
}

/* log_sums [rows, n, t], not cut by segments. Strides of q, k, v, out, in this order. */
void attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *log_sums, const int64_t *bounds,
               const Strides *strides, int64_t segments, int64_t longest, int64_t rows, int64_t n, int64_t g, int64_t t,
               int64_t d, float scale, int threads) {
    int64_t filled = (longest + BLOCK - 1) / BLOCK * BLOCK;
    int64_t bytes = 3 * ALIGNED(2 * filled * d) + ALIGNED(2 * BLOCK * filled) + ALIGNED(4 * BLOCK * filled);
    #pragma omp parallel num_threads(threads)
    {
        Setting before = set_tiles();
        char *scratch = aligned_alloc(64, bytes);
        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < segments * rows * n; task++) {
            int64_t segment = task / (rows * n), row = task / n % rows, head = task % n, group = head / (n / g);
            int64_t start = bounds[segment], size = bounds[segment + 1] - start;
            head_forward(q + place(strides, row, head, start), k + place(strides + 1, row, group, start),
                         v + place(strides + 2, row, group, start), out + place(strides + 3, row, head, start),
                         log_sums + (row * n + head) * t + start, size, d, strides, scale, scratch);
        }
        free(scratch);
        restore_tiles(&before);
    }
}

/* What a task of the way back works on. */
typedef struct {
    bf16 *rows, *keys, *values, *turned;                     /* [filled, d] and, keys again, [d, filled] */
    bf16 *q_turned, *q_pairs, *grad_turned, *grad_pairs;     /* of one query head */
    bf16 *p, *ds, *ds_pairs;                                 /* of a strip of keys and a panel of queries */
    float *log_sums, *dots;                                  /* [filled], infinite and 0 behind the last query */
    float *dq, *dk, *dv;                                     /* [d, filled], [filled, d], [filled, d] */
} Work;

static int64_t work_at(Work *work, char *base, int64_t filled, int64_t d) {
    char *at = base;
    bf16 **packed[] = {&work->rows, &work->keys, &work->values, &work->turned, &work->q_turned, &work->q_pairs,
                       &work->grad_turned, &work->grad_pairs};
    for (int i = 0; i < 8; i++)
        *packed[i] = piece(&at, 2 * filled * d);
    work->p = piece(&at, 2 * STRIP * PANEL);
    work->ds = piece(&at, 2 * STRIP * PANEL);
    work->ds_pairs = piece(&at, 2 * STRIP * PANEL);
    work->log_sums = piece(&at, 4 * filled);
    work->dots = piece(&at, 4 * filled);
    work->dq = piece(&at, 4 * filled * d);
    work->dk = piece(&at, 4 * filled * d);
    work->dv = piece(&at, 4 * filled * d);
    return at - base;
}

/* P and dS of 32 keys x 32 queries from their scores and dP; key `first` + i, query `first` + i on the diagonal. */
static void softmax_backward_block(const float *scores, const float *dp, const float *log_sums, const float *dots,
                                   float scale, int diagonal, bf16 *p, bf16 *ds, bf16 *pairs) {
    const __m512 by = _mm512_set1_ps(scale);
    for (int64_t c = 0; c < BLOCK; c += 16) {
        __m512 log_sum = _mm512_loadu_ps(log_sums + c), dot = _mm512_loadu_ps(dots + c);
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m256i both[2];
            for (int64_t e = 0; e < 2; e++) {
                int64_t key = r + e, hidden = key - c; /* queries of these 16 that come before the key */
                __m512 weight =
                    exponentials(_mm512_fmsub_ps(_mm512_loadu_ps(scores + key * BLOCK + c), by, log_sum));
                if (diagonal && hidden > 0)
                    weight = _mm512_maskz_mov_ps(hidden > 15 ? 0 : (__mmask16)(0xffffu << hidden), weight);
                __m512 change = _mm512_mul_ps(_mm512_mul_ps(by, weight),
                                              _mm512_sub_ps(_mm512_loadu_ps(dp + key * BLOCK + c), dot));
                both[e] = narrowed(change);
                _mm256_storeu_si256((__m256i *)(p + key * PANEL + c), narrowed(weight));
                _mm256_storeu_si256((__m256i *)(ds + key * PANEL + c), both[e]);
            }
            _mm512_storeu_si512(pairs + c / 16 * 2 * TILE + r * 16, interleaved(both[0], both[1]));
        }
    }
}

/* P and dS of a strip of keys from `first`, and a panel of queries from `start` */
static void strip_of_scores(const Work *work, int64_t first, int64_t keys, int64_t start, int64_t queries, int64_t d,
                            float scale) {
    int64_t chunks = d / 32;
    float scores[BLOCK * BLOCK], dp[BLOCK * BLOCK];
    for (int64_t i = 0; i < queries; i += BLOCK)
        for (int64_t j = 0; j < keys; j += BLOCK) {
            int64_t query = start + i, key = first + j, columns = query / 16 * chunks * TILE;
            bf16 *p = work->p + j * PANEL + i, *ds = work->ds + j * PANEL + i;
            bf16 *pairs = work->ds_pairs + (i / 16 * 2 + j / 32) * TILE;
            if (query < key) { /* the keys come after all of these queries */
                for (int64_t r = 0; r < BLOCK; r++) {
                    memset(p + r * PANEL, 0, 2 * BLOCK);
                    memset(ds + r * PANEL, 0, 2 * BLOCK);
                }
                memset(pairs, 0, 2 * TILE);
                memset(pairs + 2 * TILE, 0, 2 * TILE);
                continue;
            }
            clear_block();
            add_products(work->keys + key * d, d, work->q_turned + columns, work->q_turned + columns + chunks * TILE,
                         TILE, chunks);
            store_block(scores, BLOCK);
            clear_block();
            add_products(work->values + key * d, d, work->grad_turned + columns,
                         work->grad_turned + columns + chunks * TILE, TILE, chunks);
            store_block(dp, BLOCK);
            softmax_backward_block(scores, dp, work->log_sums + query, work->dots + query, scale, query == key, p, ds,
                                   pairs);
        }
}

/* One query head: dv += P^T dO, dk += dS^T q, dq = dS k */
static void head_backward(const Work *work, int64_t filled, int64_t d, float scale) {
    memset(work->dq, 0, 4 * filled * d);
    for (int64_t first = 0; first < filled; first += STRIP) {
        int64_t keys = filled - first < STRIP ? filled - first : STRIP;
        for (int64_t start = first; start < filled; start += PANEL) {
            int64_t queries = filled - start < PANEL ? filled - start : PANEL;
            strip_of_scores(work, first, keys, start, queries, d, scale);
            for (int64_t j = 0; j < keys; j += BLOCK)
                for (int64_t c = 0; c < d; c += 32) {
                    int64_t place = (first + j) * d + c, right = (start / 32 * (d / 16) + c / 16) * TILE;
                    int64_t next = d / 16 * TILE;
                    load_block(work->dv + place, d);
                    add_products(work->p + j * PANEL, PANEL, work->grad_pairs + right, work->grad_pairs + right + TILE,
                                 next, queries / 32);
                    store_block(work->dv + place, d);
                    load_block(work->dk + place, d);
                    add_products(work->ds + j * PANEL, PANEL, work->q_pairs + right, work->q_pairs + right + TILE, next,
                                 queries / 32);
                    store_block(work->dk + place, d);
                }
            for (int64_t i = 0; i < queries; i += BLOCK)
                for (int64_t c = 0; c < d; c += 32) {
                    const bf16 *right = work->ds_pairs + i / 16 * 2 * TILE;
                    load_block(work->dq + c * filled + start + i, filled);
                    add_products(work->turned + c * filled + first, filled, right, right + 2 * TILE, TILE, keys / 32);
                    store_block(work->dq + c * filled + start + i, filled);
                }
        }
    }
}

/* float [t, d] (or, turned, [d, filled]) -> bfloat16 rows */
static void narrow_rows(const float *from, int64_t t, int64_t d, bf16 *to, int64_t stride) {
    for (int64_t i = 0; i < t; i++)
        for (int64_t c = 0; c < d; c += 16)
            _mm256_storeu_si256((__m256i *)(to + i * stride + c), narrowed(_mm512_loadu_ps(from + i * d + c)));
}

static void narrow_turned(const float *from, int64_t t, int64_t filled, int64_t d, bf16 *to, int64_t stride) {
    const __m512i apart =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32((int)filled));
    for (int64_t i = 0; i < t; i++)
        for (int64_t c = 0; c < d; c += 16)
            _mm256_storeu_si256((__m256i *)(to + i * stride + c),
                                narrowed(_mm512_i32gather_ps(apart, from + c * filled + i, 4)));
}

/* dots [t] = sum over components of grad out */
static void row_products(const bf16 *grad, const bf16 *out, int64_t t, int64_t d, int64_t grad_token, int64_t out_token,
                         float *dots) {
    for (int64_t i = 0; i < t; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < d; c += 16)
            sum = _mm512_fmadd_ps(widened(_mm256_loadu_si256((const __m256i *)(grad + i * grad_token + c))),
                                  widened(_mm256_loadu_si256((const __m256i *)(out + i * out_token + c))), sum);
        dots[i] = _mm512_reduce_add_ps(sum);
    }
}

/* Strides of grad, q, k, v, out, dq, dk, dv, in this order; log_sums as `attention` left them. */
void attention_backward(const bf16 *grad, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out,
                        const float *log_sums, bf16 *dq, bf16 *dk, bf16 *dv, const int64_t *bounds,
                        const Strides *strides, int64_t segments, int64_t longest, int64_t rows, int64_t n, int64_t g,
                        int64_t t, int64_t d, float scale, int threads) {
    int64_t m = n / g;
    #pragma omp parallel num_threads(threads)
    {
        Setting before = set_tiles();
        Work work;
        int64_t most = (longest + BLOCK - 1) / BLOCK * BLOCK;
        char *scratch = aligned_alloc(64, work_at(&work, 0, most, d));
        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < segments * rows * g; task++) {
            int64_t segment = task / (rows * g), row = task / g % rows, group = task % g;
            int64_t start = bounds[segment], size = bounds[segment + 1] - start;
            int64_t filled = (size + BLOCK - 1) / BLOCK * BLOCK;
            work_at(&work, scratch, filled, d);
            copy_rows(k + place(strides + 2, row, group, start), strides[2].token, size, filled, d, work.keys);
            transpose(work.keys, filled, d, work.turned);
            copy_rows(v + place(strides + 3, row, group, start), strides[3].token, size, filled, d, work.values);
            memset(work.dk, 0, 4 * filled * d);
            memset(work.dv, 0, 4 * filled * d);
            for (int64_t i = size; i < filled; i++) {
                work.log_sums[i] = INFINITY;
                work.dots[i] = 0;
            }
            for (int64_t head = group * m; head < (group + 1) * m; head++) {
                copy_rows(q + place(strides + 1, row, head, start), strides[1].token, size, filled, d, work.rows);
                pack_transposed(work.rows, filled, d, work.q_turned);
                pack_pairs(work.rows, filled, d, work.q_pairs);
                copy_rows(grad + place(strides + 0, row, head, start), strides[0].token, size, filled, d, work.rows);
                pack_transposed(work.rows, filled, d, work.grad_turned);
                pack_pairs(work.rows, filled, d, work.grad_pairs);
                memcpy(work.log_sums, log_sums + (row * n + head) * t + start, 4 * size);
                row_products(work.rows, out + place(strides + 4, row, head, start), size, d, d, strides[4].token, work.dots);
                head_backward(&work, filled, d, scale);
                narrow_turned(work.dq, size, filled, d, dq + place(strides + 5, row, head, start), strides[5].token);
            }
            narrow_rows(work.dk, size, d, dk + place(strides + 6, row, group, start), strides[6].token);
            narrow_rows(work.dv, size, d, dv + place(strides + 7, row, group, start), strides[7].token);
        }
        free(scratch);
        restore_tiles(&before);
    }
}

#else

int tiles(void) { return 0; }

#endif
