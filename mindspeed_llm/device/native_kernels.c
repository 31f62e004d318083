/* Row-wise work that torch does operation by operation on a CPU, in one pass over memory each.
 *
 * Compiled at first use by `native.py`. T is float, or with -DBF16 bfloat16; arithmetic is in float,
 * results are rounded once. Rows are contiguous unless a stride is given; strides count elements. Threads are
 * those of torch's own OpenMP runtime, `threads` of them.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

#ifdef BF16
typedef uint16_t T;
typedef float Sum; /* exact enough for eight bits */

static inline float load(const T *p) { return from_bits((uint32_t)*p << 16); }

static inline void store(T *p, float value) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *p = (T)(value == value ? rounded : 0x7fc0u);
}
#else
typedef float T;
typedef double Sum; /* a sum's error would scale a whole row */

static inline float load(const T *p) { return *p; }

static inline void store(T *p, float value) { *p = value; }
#endif

#ifdef __FP_FAST_FMAF
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* e^x to 2 units in the last place, 0 below -87.3; Cody and Waite's reduction and the polynomial of Cephes' expf. */
static inline float exponential(float x) {
    float low = x < -87.3f ? 0.0f : 1.0f;
    x = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    float shifted = MULTIPLY_ADD(x, 1.44269504088896341f, 12582912.0f); /* 1.5 * 2^23: rounds to an integer */
    float n = shifted - 12582912.0f;
    float f = MULTIPLY_ADD(n, 2.12194440e-4f, MULTIPLY_ADD(n, -0.693359375f, x));
    float p = MULTIPLY_ADD(1.9875691500e-4f, f, 1.3981999507e-3f);
    p = MULTIPLY_ADD(p, f, 8.3334519073e-3f);
    p = MULTIPLY_ADD(p, f, 4.1665795894e-2f);
    p = MULTIPLY_ADD(p, f, 1.6666665459e-1f);
    p = MULTIPLY_ADD(p, f, 5.0000001201e-1f);
    p = MULTIPLY_ADD(p, f * f, f) + 1.0f; /* 1 last: the sum's own rounding is the largest */
    return low * p * from_bits((uint32_t)((int32_t)n + 127) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = x r w, r = (mean(x^2) + eps)^-1/2; x, y [n, h], w [h], inverse [n] = r */
void rms_norm(const T *x, const T *w, T *y, float *inverse, int64_t n, int64_t h, float eps, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const T *from = x + i * h;
        T *to = y + i * h;
        Sum sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < h; j++) {
            Sum value = load(from + j);
            sum += value * value;
        }
        float r = (float)(1.0 / sqrt((double)sum / (double)h + eps)); /* rounded once: it scales the whole row */
        inverse[i] = r;
        #pragma omp simd
        for (int64_t j = 0; j < h; j++)
            store(to + j, load(from + j) * r * load(w + j));
    }
}

/* dx = r (g - x r mean(g x r)), g = dy w */
void rms_norm_backward(const T *dy, const T *x, const T *w, const float *inverse, T *dx, int64_t n, int64_t h,
                           int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const T *grad = dy + i * h, *from = x + i * h;
        T *to = dx + i * h;
        float r = inverse[i];
        Sum dot = 0;
        #pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < h; j++)
            dot += (Sum)(load(grad + j) * load(w + j)) * load(from + j);
        float along = (float)(dot * r * r / h);
        #pragma omp simd
        for (int64_t j = 0; j < h; j++)
            store(to + j, r * (load(grad + j) * load(w + j) - along * load(from + j)));
    }
}

/* u = silu(gate) up; hidden [n, 2 f] = gate, up; u [n, f] */
void swiglu(const T *hidden, T *u, int64_t n, int64_t f, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const T *gate = hidden + 2 * i * f, *up = gate + f;
        T *to = u + i * f;
        #pragma omp simd
        for (int64_t j = 0; j < f; j++) {
            float z = load(gate + j);
            store(to + j, z * sigmoid(z) * load(up + j));
        }
    }
}

/* du [n, f] -> dhidden [n, 2 f], and u [n, f] made again */
void swiglu_backward(const T *du, const T *hidden, T *dhidden, T *u, int64_t n, int64_t f, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const T *gate = hidden + 2 * i * f, *up = gate + f, *grad = du + i * f;
        T *dgate = dhidden + 2 * i * f, *dup = dgate + f, *to = u + i * f;
        #pragma omp simd
        for (int64_t j = 0; j < f; j++) {
            float z = load(gate + j), v = load(up + j), g = load(grad + j);
            float s = sigmoid(z);
            float opened = z * s;
            store(dgate + j, g * v * s * (1.0f + z - opened));
            store(dup + j, g * opened);
            store(to + j, opened * v);
        }
    }
}

/* Turn the first r of d components by their position, `sign` -1 for the way back; x [s, b, n, d] with strides,
 * y contiguous, table [s, 2, r] = cosines, sines with a stride of `table_stride` between positions. */
void rope(const T *x, const float *table, T *y, int64_t s, int64_t b, int64_t n, int64_t d, int64_t r,
              int64_t s_stride, int64_t b_stride, int64_t n_stride, int64_t table_stride, float sign,
              int threads) {
    int64_t half = r / 2;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < s * b; row++) {
        const float *cosine = table + row / b * table_stride, *sine = cosine + r;
        for (int64_t k = 0; k < n; k++) {
            const T *from = x + row / b * s_stride + row % b * b_stride + k * n_stride;
            T *to = y + (row * n + k) * d;
            #pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float first = load(from + j), second = load(from + half + j);
                store(to + j, first * cosine[j] - sign * second * sine[sign > 0 ? j : half + j]);
                store(to + half + j, second * cosine[half + j] + sign * first * sine[sign > 0 ? half + j : j]);
            }
            for (int64_t j = r; j < d; j++) to[j] = from[j];
        }
    }
}

/* sums[i] = sum_l a[i, l] b[i, l] for the rows i of two [n0, n1, n2, d] with strides between rows */
void row_dots(const T *a, const T *b, float *sums, int64_t n0, int64_t n1, int64_t n2, int64_t d, int64_t a0, int64_t a1,
              int64_t a2, int64_t b0, int64_t b1, int64_t b2, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n0 * n1 * n2; i++) {
        int64_t x = i / (n1 * n2), y = i / n2 % n1, z = i % n2;
        const T *left = a + x * a0 + y * a1 + z * a2, *right = b + x * b0 + y * b1 + z * b2;
        Sum sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t l = 0; l < d; l++)
            sum += (Sum)load(left + l) * load(right + l);
        sums[i] = (float)sum;
    }
}

/* Of causal attention: scores and dp [n, k, m, q] (float), keys by m query heads by queries -> p = exp(scale scores -
 * log_sums) and ds = scale p (dp - dots), both T; query i sees keys up to first + i; log_sums, dots [n, m, q]. p may lie
 * where the scores do, ds where dp does, if T is float. */
void softmax_backward(const float *scores, const float *dp, const float *log_sums, const float *dots, T *p, T *ds,
                      int64_t n, int64_t k, int64_t m, int64_t q, int64_t first, float scale, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n * k; row++) {
        int64_t hidden = row % k - first; /* queries before this one do not see the key */
        hidden = hidden < 0 ? 0 : hidden < q ? hidden : q;
        for (int64_t head = 0; head < m; head++) {
            int64_t place = (row * m + head) * q, other = (row / k * m + head) * q;
            const float *score = scores + place, *grad = dp + place, *log_sum = log_sums + other, *dot = dots + other;
            T *to = p + place, *out = ds + place;
            for (int64_t j = 0; j < hidden; j++) to[j] = out[j] = 0;
            #pragma omp simd
            for (int64_t j = hidden; j < q; j++) {
                float weight = exponential(scale * score[j] - log_sum[j]);
                float change = scale * weight * (grad[j] - dot[j]);
                store(to + j, weight);
                store(out + j, change);
            }
        }
    }
}

/* peaks[i] = max_j logits[i, j]; logits [n, width], `stride` between rows */
void row_peaks(const T *logits, float *peaks, int64_t n, int64_t width, int64_t stride, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const T *row = logits + i * stride;
        float peak = -INFINITY;
        #pragma omp simd reduction(max : peak)
        for (int64_t j = 0; j < width; j++) {
            float value = load(row + j);
            peak = value > peak ? value : peak;
        }
        peaks[i] = peak;
    }
}

/* logits <- exp(logits - peaks), sums[i] = the row's sum before rounding */
void row_exponentials(T *logits, const float *peaks, float *sums, int64_t n, int64_t width, int64_t stride,
                          int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        T *row = logits + i * stride;
        float sum = 0.0f, peak = peaks[i];
        #pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; j++) {
            float value = exponential(load(row + j) - peak);
            sum += value;
            store(row + j, value);
        }
        sums[i] = sum;
    }
}
