/* Causal attention on a CPU, forward and back, whose scores never leave the core's cache.
 *
 * Compiled at first use by `native.py`, where the compiler's `native` has what one of the two headers needs: matrix tiles
 * for bfloat16, vectors of 512 bits for float. `blocks` says at run time whether it may be used. P and dS are rounded to T as
 * operands; scores, dP and all sums are float.
 *
 * Shapes: `rows` batch, n query heads, g key heads, t tokens, d head dimension, a multiple of 32. A segment is a run of
 * tokens that see each other; bounds [segments + 1] says where each begins. `filled` is its number of tokens, filled up
 * to a multiple of 32. Strides count elements, of (row, head, token); components lie side by side.
 */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 32  /* queries or keys of a block */
#define STRIP 64  /* keys whose gradients are summed at a time */
#define PANEL 256 /* queries they are summed over at a time */

#if defined(NO_BLOCKS)
#elif defined(BF16) && defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>

#include "native_tiles.h"
#define THERE
#elif !defined(BF16) && defined(__AVX512F__)
#include <immintrin.h>

#include "native_vectors.h"
#define THERE
#endif

#ifdef THERE

#define ALIGNED(bytes) (((bytes) + 63) / 64 * 64)
#define PADDED(filled) ((filled) + 64 / (int64_t)sizeof(T)) /* rows a power of two apart would share a place in the cache */
#define FILLED(t) (((t) + BLOCK - 1) / BLOCK * BLOCK)

typedef struct {
    int64_t row, head, token;
} Strides;

static inline int64_t place(const Strides *one, int64_t row, int64_t head, int64_t token) {
    return row * one->row + head * one->head + token * one->token;
}

/* e^x, to about a unit in the last place; 0 where it would be below the least float. */
static inline __m512 exponentials(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x); /* in this order NaN stays NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), f);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.9875691500e-4f), f, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, f), f, f);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}

/* to [filled, d], the t rows of `from` and zeros behind them */
static void copy_rows(const T *from, int64_t stride, int64_t t, int64_t filled, int64_t d, T *to) {
    for (int64_t i = 0; i < t; i++)
        memcpy(to + i * d, from + i * stride, sizeof(T) * d);
    memset(to + t * d, 0, sizeof(T) * (filled - t) * d);
}

/* One block of memory, cut into pieces. */
static void *piece(char **at, int64_t bytes) {
    void *found = *at;
    *at += ALIGNED(bytes);
    return found;
}

/* Memory of one thread; a process that gets none ends with a word. */
static char *memory_of(int64_t bytes) {
    char *found = aligned_alloc(64, ALIGNED(bytes));
    if (!found) {
        fprintf(stderr, "attention: no %lld bytes of memory for a thread\n", (long long)bytes);
        abort();
    }
    return found;
}

/* p [32, keys] = exp(scale scores - peak) where key <= query, 0 elsewhere; scores [32, keys] */
static void softmax_block(const float *scores, T *p, int64_t width, int64_t keys, float scale, float *peaks,
                          float *sums) {
    for (int64_t r = 0; r < BLOCK; r++) {
        const float *row = scores + r * width;
        T *to = p + r * width;
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
            store16(to + j, weight);
        }
        sums[r] = _mm512_reduce_add_ps(sum);
    }
}

/* One head of one segment: out = softmax(scale q k^T) v, log_sums [t]; strides of q, k, v, out, in this order */
static void head_forward(const T *q, const T *k, const T *v, T *out, float *log_sums, int64_t t, int64_t d,
                         const Strides *strides, float scale, char *scratch) {
    int64_t filled = FILLED(t), width = PADDED(filled);
    T *rows = piece(&scratch, sizeof(T) * filled * d), *keys = piece(&scratch, sizeof(T) * filled * d);
    T *values = piece(&scratch, sizeof(T) * filled * d), *p = piece(&scratch, sizeof(T) * BLOCK * width);
    float *scores = piece(&scratch, 4 * BLOCK * width);
    float peaks[BLOCK], sums[BLOCK], made[BLOCK * BLOCK];
    copy_rows(k, strides[1].token, t, filled, d, rows);
    turn_right(rows, filled, d, keys);
    copy_rows(v, strides[2].token, t, filled, d, rows);
    pack_right(rows, filled, d, values);
    copy_rows(q, strides[0].token, t, filled, d, rows);
    for (int64_t i = 0; i < filled; i += BLOCK) {
        int64_t seen = i + BLOCK, wanted = t - i < BLOCK ? t - i : BLOCK;
        for (int64_t j = 0; j < seen; j += BLOCK)
            product(scores + j, width, 0, left_rows(rows + i * d, d), right_turned(keys, j, filled, d), d);
        softmax_block(scores, p, width, seen, scale, peaks, sums);
        for (int64_t c = 0; c < d; c += BLOCK) {
            product(made, BLOCK, 0, left_rows(p, width), right_rows(values, 0, c, d), seen);
            for (int64_t r = 0; r < wanted; r++) {
                __m512 by = _mm512_set1_ps(1.0f / sums[r]);
                T *to = out + (i + r) * strides[3].token + c;
                for (int64_t l = 0; l < BLOCK; l += 16)
                    store16(to + l, _mm512_mul_ps(_mm512_loadu_ps(made + r * BLOCK + l), by));
            }
        }
        for (int64_t r = 0; r < wanted; r++)
            log_sums[i + r] = peaks[r] + logf(sums[r]);
    }
}

/* log_sums [rows, n, t], not cut by segments. Strides of q, k, v, out, in this order. */
void attention(const T *q, const T *k, const T *v, T *out, float *log_sums, const int64_t *bounds,
               const Strides *strides, int64_t segments, int64_t longest, int64_t rows, int64_t n, int64_t g, int64_t t,
               int64_t d, float scale, int threads) {
    int64_t most = FILLED(longest), width = PADDED(most), tasks = segments * rows * n;
    int64_t bytes = 3 * ALIGNED(sizeof(T) * most * d) + ALIGNED(sizeof(T) * BLOCK * width) + ALIGNED(4 * BLOCK * width);
    #pragma omp parallel num_threads(threads < tasks ? threads : (int)tasks)
    {
        Setting before = begin();
        char *scratch = memory_of(bytes);
        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t segment = task / (rows * n), row = task / n % rows, head = task % n, group = head / (n / g);
            int64_t start = bounds[segment], size = bounds[segment + 1] - start;
            head_forward(q + place(strides, row, head, start), k + place(strides + 1, row, group, start),
                         v + place(strides + 2, row, group, start), out + place(strides + 3, row, head, start),
                         log_sums + (row * n + head) * t + start, size, d, strides, scale, scratch);
        }
        free(scratch);
        end(&before);
    }
}

/* What a task of the way back works on. */
typedef struct {
    T *rows, *keys, *values, *keys_turned;                 /* of a key head */
    T *q_turned, *q_packed, *grad_turned, *grad_packed;    /* of one query head */
    T *p, *ds, *ds_kept;                                   /* of a strip of keys and a panel of queries */
    float *log_sums, *dots;                                /* [filled], infinite and 0 behind the last query */
    float *dq, *dk, *dv;                                   /* [d, filled], [filled, d], [filled, d] */
} Work;

/* Pieces of the memory from `base` on; -> their size */
static int64_t work_at(Work *work, char *base, int64_t filled, int64_t d) {
    char *at = base;
    T **heads[] = {&work->rows, &work->keys, &work->values, &work->keys_turned, &work->q_turned, &work->q_packed,
                   &work->grad_turned, &work->grad_packed};
    T **strips[] = {&work->p, &work->ds, &work->ds_kept};
    float **sums[] = {&work->dq, &work->dk, &work->dv};
    for (int i = 0; i < 8; i++)
        *heads[i] = piece(&at, sizeof(T) * filled * d);
    for (int i = 0; i < 3; i++)
        *strips[i] = piece(&at, sizeof(T) * STRIP * PANEL);
    for (int i = 0; i < 3; i++)
        *sums[i] = piece(&at, 4 * filled * d);
    work->log_sums = piece(&at, 4 * filled);
    work->dots = piece(&at, 4 * filled);
    return at - base;
}

/* P and dS of the 32 keys from `row` of the strip and the 32 queries from `column` of the panel; on the diagonal a key is
 * hidden from the queries before it */
static void softmax_backward_block(const Work *work, const float *scores, const float *dp, int64_t row, int64_t column,
                                   int64_t query, int diagonal, float scale) {
    const __m512 by = _mm512_set1_ps(scale);
    for (int64_t c = 0; c < BLOCK; c += 16) {
        __m512 log_sum = _mm512_loadu_ps(work->log_sums + query + c), dot = _mm512_loadu_ps(work->dots + query + c);
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m512 changes[2];
            for (int64_t e = 0; e < 2; e++) {
                int64_t key = r + e, hidden = key - c, to = (row + key) * PANEL + column + c;
                __m512 score = _mm512_loadu_ps(scores + key * BLOCK + c), grad = _mm512_loadu_ps(dp + key * BLOCK + c);
                __m512 weight = exponentials(_mm512_fmsub_ps(score, by, log_sum));
                if (diagonal && hidden > 0)
                    weight = _mm512_maskz_mov_ps(hidden > 15 ? 0 : (__mmask16)(0xffffu << hidden), weight);
                changes[e] = _mm512_mul_ps(_mm512_mul_ps(by, weight), _mm512_sub_ps(grad, dot));
                store16(work->p + to, weight);
                store16(work->ds + to, changes[e]);
            }
            keep_two(work->ds_kept, row + r, column + c, changes[0], changes[1]);
        }
    }
}

/* P and dS of a strip of keys from `first`, and a panel of queries from `start` */
static void strip_of_scores(const Work *work, int64_t first, int64_t keys, int64_t start, int64_t queries,
                            int64_t filled, int64_t d, float scale) {
    float scores[BLOCK * BLOCK], dp[BLOCK * BLOCK];
    for (int64_t i = 0; i < queries; i += BLOCK)
        for (int64_t j = 0; j < keys; j += BLOCK) {
            int64_t query = start + i, key = first + j;
            if (query < key) { /* the keys come after all of these queries */
                for (int64_t r = j; r < j + BLOCK; r++) {
                    memset(work->p + r * PANEL + i, 0, sizeof(T) * BLOCK);
                    memset(work->ds + r * PANEL + i, 0, sizeof(T) * BLOCK);
                }
                keep_none(work->ds_kept, j, i);
                continue;
            }
            product(scores, BLOCK, 0, left_rows(work->keys + key * d, d),
                    right_turned(work->q_turned, query, filled, d), d);
            product(dp, BLOCK, 0, left_rows(work->values + key * d, d),
                    right_turned(work->grad_turned, query, filled, d), d);
            softmax_backward_block(work, scores, dp, j, i, query, query == key, scale);
        }
}

/* One query head: dv += P^T dO, dk += dS^T q, dq^T = k^T dS^T */
static void head_backward(const Work *work, int64_t filled, int64_t d, float scale) {
    memset(work->dq, 0, 4 * filled * d);
    for (int64_t first = 0; first < filled; first += STRIP) {
        int64_t keys = filled - first < STRIP ? filled - first : STRIP;
        for (int64_t start = first; start < filled; start += PANEL) {
            int64_t queries = filled - start < PANEL ? filled - start : PANEL;
            strip_of_scores(work, first, keys, start, queries, filled, d, scale);
            for (int64_t j = 0; j < keys; j += BLOCK)
                for (int64_t c = 0; c < d; c += BLOCK) {
                    int64_t to = (first + j) * d + c;
                    product(work->dv + to, d, 1, left_rows(work->p + j * PANEL, PANEL),
                            right_rows(work->grad_packed, start, c, d), queries);
                    product(work->dk + to, d, 1, left_rows(work->ds + j * PANEL, PANEL),
                            right_rows(work->q_packed, start, c, d), queries);
                }
            for (int64_t i = 0; i < queries; i += BLOCK)
                for (int64_t c = 0; c < d; c += BLOCK)
                    product(work->dq + c * filled + start + i, filled, 1,
                            left_turned(work->keys_turned, c, first, filled, d),
                            right_kept(work->ds, work->ds_kept, i), keys);
        }
    }
}

/* float [t, d], or turned [d, filled], to rows of T */
static void write_rows(const float *from, int64_t t, int64_t d, T *to, int64_t stride) {
    for (int64_t i = 0; i < t; i++)
        for (int64_t c = 0; c < d; c += 16)
            store16(to + i * stride + c, _mm512_loadu_ps(from + i * d + c));
}

static void write_turned(const float *from, int64_t t, int64_t filled, int64_t d, T *to, int64_t stride) {
    const __m512i apart =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32((int)filled));
    for (int64_t i = 0; i < t; i++)
        for (int64_t c = 0; c < d; c += 16)
            store16(to + i * stride + c, _mm512_i32gather_ps(apart, from + c * filled + i, 4));
}

/* dots [t] = sum over components of grad out */
static void row_products(const T *grad, const T *out, int64_t t, int64_t d, int64_t grad_token, int64_t out_token,
                         float *dots) {
    for (int64_t i = 0; i < t; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < d; c += 16)
            sum = _mm512_fmadd_ps(load16(grad + i * grad_token + c), load16(out + i * out_token + c), sum);
        dots[i] = _mm512_reduce_add_ps(sum);
    }
}

/* Strides of grad, q, k, v, out, dq, dk, dv, in this order; log_sums as `attention` left them. */
void attention_backward(const T *grad, const T *q, const T *k, const T *v, const T *out,
                        const float *log_sums, T *dq, T *dk, T *dv, const int64_t *bounds,
                        const Strides *strides, int64_t segments, int64_t longest, int64_t rows, int64_t n, int64_t g,
                        int64_t t, int64_t d, float scale, int threads) {
    int64_t m = n / g, tasks = segments * rows * g;
    #pragma omp parallel num_threads(threads < tasks ? threads : (int)tasks)
    {
        Setting before = begin();
        Work work;
        int64_t most = FILLED(longest);
        char *scratch = memory_of(work_at(&work, 0, most, d));
        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t segment = task / (rows * g), row = task / g % rows, group = task % g;
            int64_t start = bounds[segment], size = bounds[segment + 1] - start;
            int64_t filled = FILLED(size);
            work_at(&work, scratch, filled, d);
            copy_rows(k + place(strides + 2, row, group, start), strides[2].token, size, filled, d, work.keys);
            turn_left(work.keys, filled, d, work.keys_turned);
            copy_rows(v + place(strides + 3, row, group, start), strides[3].token, size, filled, d, work.values);
            memset(work.dk, 0, 4 * filled * d);
            memset(work.dv, 0, 4 * filled * d);
            for (int64_t i = size; i < filled; i++) {
                work.log_sums[i] = INFINITY;
                work.dots[i] = 0;
            }
            for (int64_t head = group * m; head < (group + 1) * m; head++) {
                copy_rows(q + place(strides + 1, row, head, start), strides[1].token, size, filled, d, work.rows);
                turn_right(work.rows, filled, d, work.q_turned);
                pack_right(work.rows, filled, d, work.q_packed);
                copy_rows(grad + place(strides + 0, row, head, start), strides[0].token, size, filled, d, work.rows);
                turn_right(work.rows, filled, d, work.grad_turned);
                pack_right(work.rows, filled, d, work.grad_packed);
                memcpy(work.log_sums, log_sums + (row * n + head) * t + start, 4 * size);
                row_products(work.rows, out + place(strides + 4, row, head, start), size, d, d, strides[4].token, work.dots);
                head_backward(&work, filled, d, scale);
                write_turned(work.dq, size, filled, d, dq + place(strides + 5, row, head, start), strides[5].token);
            }
            write_rows(work.dk, size, d, dk + place(strides + 6, row, group, start), strides[6].token);
            write_rows(work.dv, size, d, dv + place(strides + 7, row, group, start), strides[7].token);
        }
        free(scratch);
        end(&before);
    }
}

#else

int blocks(void) { return 0; }

#endif
