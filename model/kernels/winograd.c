/* 3×3 convolution by Winograd's F(5×5, 3×3), its products in float32 or in 16-bit integers, by AVX-512.

   A product of integers is as fast as one of bfloat16, twice as fast as float32's, and rounds less than the former: what
   is multiplied at one point is a vector of channels, scaled by its norm so that no sum of products can leave 32 bits
   (Cauchy and Schwarz). A few tiles go through all steps at once, so that what passes between them stays in the cache;
   each tile is computed the same whatever is beside it. model/compiled_winograd.py calls this. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TILE 5                /* outputs of a tile along an axis */
#define POINTS (TILE + 2)     /* along an axis of a tile: three pairs that differ in sign, and infinity */
#define PAIRS 3
#define ALL (POINTS * POINTS)
#define LANES 16              /* floats of a register */
#define GROUP 32              /* output channels computed at once */
#define ROWS 6                /* tiles multiplied at once: with GROUP, sums enough that none waits for itself */
#define MOST_TILES 18         /* of a thread at once: more of them would not stay in its cache */
#define LARGEST_NORM 46000.f  /* of the integers of a vector: the square of it, and of its rounding, is below 2^31 */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef struct {
    const void *x;             /* (N, H, W, C) float or bfloat16 */
    void *y;                   /* (N, H, W, K) float or bfloat16 */
    const void *plus;          /* like y, in either; or null */
    const void *weight;        /* (K / GROUP, ALL, C, GROUP) float, or (K / GROUP, ALL, C / 2, GROUP, 2) int16 */
    const float *weight_scale; /* (ALL, K) what one of the integers is worth; null for float */
    const float *bias;         /* (K,) */
    const float *before;       /* (POINTS, POINTS), what transforms inputs along an axis */
    const float *after;        /* (TILE, POINTS), what restores outputs */
    int64_t images, height, width, channels, outputs;
    int64_t x_is_bf16, y_is_bf16, plus_is_bf16, relu, threads;
} Convolution;

typedef struct {
    int64_t image, top, left;
} Place; /* of a tile's first output */

INLINE __m512 load(const void *at, int64_t is_bf16) {
    if (!is_bf16) return _mm512_loadu_ps(at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16));
}

INLINE void store(void *at, __m512 values, int64_t is_bf16) {
    if (is_bf16)
        _mm256_storeu_si256(at, (__m256i)_mm512_cvtneps_pbh(values));
    else
        _mm512_storeu_ps(at, values);
}

INLINE int64_t tiles_along(int64_t side) { return (side + TILE - 1) / TILE; }

INLINE Place place_of(const Convolution *of, int64_t tile) {
    int64_t down = tiles_along(of->height), across = tiles_along(of->width);
    return (Place){tile / (down * across), tile / across % down * TILE, tile % across * TILE};
}

/* Rows 2i and 2i + 1 are of points that differ in sign: equal in odd columns, opposite in even ones. */
INLINE void transform(__m512 *out, int step, const float *before, const __m512 *in) {
UNROLL
    for (int i = 0; i < PAIRS; i++) {
        const float *row = before + 2 * i * POINTS;
        __m512 even = _mm512_mul_ps(_mm512_set1_ps(row[0]), in[0]);
        __m512 odd = _mm512_mul_ps(_mm512_set1_ps(row[1]), in[1]);
UNROLL
        for (int j = 2; j < POINTS - 1; j += 2) {
            even = _mm512_fmadd_ps(_mm512_set1_ps(row[j]), in[j], even);
            odd = _mm512_fmadd_ps(_mm512_set1_ps(row[j + 1]), in[j + 1], odd);
        }
        out[2 * i * step] = _mm512_add_ps(odd, even);
        out[(2 * i + 1) * step] = _mm512_sub_ps(odd, even);
    }
    const float *row = before + (POINTS - 1) * POINTS; /* zero in odd columns */
    __m512 last = _mm512_mul_ps(_mm512_set1_ps(row[0]), in[0]);
UNROLL
    for (int j = 2; j < POINTS; j += 2) last = _mm512_fmadd_ps(_mm512_set1_ps(row[j]), in[j], last);
    out[(POINTS - 1) * step] = last;
}

/* Columns 2i and 2i + 1 are equal in even rows and opposite in odd ones; the last has a one in the last row alone. */
INLINE void restore(__m512 *out, int step, const float *after, const __m512 *in) {
    __m512 sums[PAIRS], differences[PAIRS];
UNROLL
    for (int i = 0; i < PAIRS; i++) {
        sums[i] = _mm512_add_ps(in[2 * i], in[2 * i + 1]);
        differences[i] = _mm512_sub_ps(in[2 * i], in[2 * i + 1]);
    }
UNROLL
    for (int j = 0; j < TILE; j++) {
        const __m512 *terms = j % 2 ? differences : sums;
        __m512 sum = _mm512_mul_ps(_mm512_set1_ps(after[j * POINTS]), terms[0]);
UNROLL
        for (int i = 1; i < PAIRS; i++) sum = _mm512_fmadd_ps(_mm512_set1_ps(after[j * POINTS + 2 * i]), terms[i], sum);
        out[j * step] = j == TILE - 1 ? _mm512_add_ps(sum, in[POINTS - 1]) : sum;
    }
}

/* A tile's inputs at all points, each (C,), `step` apart. */
INLINE void transform_tile(const Convolution *of, Place place, int64_t is_bf16, float *at_points, int64_t step) {
    static const float nothing[LANES];
    const int64_t size = is_bf16 ? 2 : 4;
    const char *cells[ALL];
    int64_t sizes[ALL];
    for (int p = 0; p < ALL; p++) {
        int64_t row = place.top - 1 + p / POINTS, column = place.left - 1 + p % POINTS;
        int is_inside = row >= 0 && row < of->height && column >= 0 && column < of->width;
        int64_t cell = (place.image * of->height + row) * of->width + column;
        cells[p] = is_inside ? (const char *)of->x + cell * of->channels * size : (const char *)nothing;
        sizes[p] = is_inside ? size : 0;
    }
    __m512 columns[ALL], in[POINTS], out[POINTS];
    for (int64_t c = 0; c < of->channels; c += LANES) {
UNROLL
        for (int q = 0; q < POINTS; q++) {
UNROLL
            for (int p = 0; p < POINTS; p++) in[p] = load(cells[p * POINTS + q] + c * sizes[p * POINTS + q], is_bf16);
            transform(columns + q, POINTS, of->before, in);
        }
UNROLL
        for (int p = 0; p < POINTS; p++) {
            transform(out, 1, of->before, columns + p * POINTS);
UNROLL
            for (int q = 0; q < POINTS; q++) _mm512_store_ps(at_points + (p * POINTS + q) * step + c, out[q]);
        }
    }
}

/* Integers and what one of them is worth: nothing where the squares of all vanish, not a number where the sum of the
   squares is not finite. */
INLINE float quantise(const float *values, int16_t *integers, int64_t channels) {
    __m512 squares = _mm512_setzero_ps(), largest = _mm512_setzero_ps();
    for (int64_t c = 0; c < channels; c += LANES) {
        __m512 v = _mm512_load_ps(values + c);
        squares = _mm512_fmadd_ps(v, v, squares);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    }
    float sum = _mm512_reduce_add_ps(squares);
    if (!(sum >= FLT_MIN && sum <= FLT_MAX)) {
        memset(integers, 0, channels * sizeof *integers);
        return sum <= FLT_MAX ? 0 : NAN;
    }
    float unit = fmaxf(sqrtf(sum) / LARGEST_NORM, _mm512_reduce_max_ps(largest) / INT16_MAX);
    __m512 per = _mm512_set1_ps(1 / unit);
    for (int64_t c = 0; c < channels; c += LANES) {
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(values + c), per));
        _mm256_store_si256((__m256i *)(integers + c), _mm512_cvtsepi32_epi16(rounded));
    }
    return unit;
}

/* At one point: of `rows` tiles (rows, C) and weights (C, GROUP), sums (rows, GROUP), `step` apart. */
INLINE void multiply_floats(
    const float *x, const float *weight, int64_t channels, float *y, int64_t step, const int rows
) {
    __m512 sums[ROWS][GROUP / LANES], weights[GROUP / LANES];
UNROLL
    for (int r = 0; r < rows; r++)
UNROLL
        for (int k = 0; k < GROUP / LANES; k++) sums[r][k] = _mm512_setzero_ps();
    for (int64_t c = 0; c < channels; c++) {
UNROLL
        for (int k = 0; k < GROUP / LANES; k++) weights[k] = _mm512_load_ps(weight + c * GROUP + k * LANES);
UNROLL
        for (int r = 0; r < rows; r++) {
            __m512 value = _mm512_set1_ps(x[r * channels + c]);
UNROLL
            for (int k = 0; k < GROUP / LANES; k++)
                __asm__("vfmadd231ps %2, %1, %0" : "+v"(sums[r][k]) : "v"(value), "v"(weights[k]));
        }
    }
UNROLL
    for (int r = 0; r < rows; r++)
UNROLL
        for (int k = 0; k < GROUP / LANES; k++) _mm512_store_ps(y + r * step + k * LANES, sums[r][k]);
}

/* The same of integers, pairs of channels side by side. */
INLINE void multiply_integers(
    const int16_t *x, const float *x_scale, const int16_t *weight, const float *weight_scale, int64_t channels,
    float *y, int64_t step, const int rows
) {
    __m512i sums[ROWS][GROUP / LANES], weights[GROUP / LANES];
UNROLL
    for (int r = 0; r < rows; r++)
UNROLL
        for (int k = 0; k < GROUP / LANES; k++) sums[r][k] = _mm512_setzero_si512();
    for (int64_t c = 0; c < channels; c += 2) {
UNROLL
        for (int k = 0; k < GROUP / LANES; k++) weights[k] = _mm512_load_si512(weight + c * GROUP + k * 2 * LANES);
UNROLL
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * channels + c, sizeof pair);
            __m512i pairs = _mm512_set1_epi32(pair);
UNROLL
            for (int k = 0; k < GROUP / LANES; k++)
                __asm__("vpdpwssd %2, %1, %0" : "+v"(sums[r][k]) : "v"(pairs), "v"(weights[k]));
        }
    }
UNROLL
    for (int r = 0; r < rows; r++)
UNROLL
        for (int k = 0; k < GROUP / LANES; k++) {
            __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scale[r]), _mm512_load_ps(weight_scale + k * LANES));
            _mm512_store_ps(y + r * step + k * LANES, _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][k]), scale));
        }
}

/* Outputs k to k + GROUP of `rows` tiles at a point. */
INLINE void multiply(
    const Convolution *of, int64_t point, int64_t k, const void *x, const float *x_scale, float *sums, const int rows
) {
    int64_t at = (k * ALL + point * GROUP) * of->channels;
    if (of->weight_scale)
        multiply_integers(
            x, x_scale, (const int16_t *)of->weight + at, of->weight_scale + point * of->outputs + k, of->channels,
            sums, ALL * GROUP, rows
        );
    else
        multiply_floats(x, (const float *)of->weight + at, of->channels, sums, ALL * GROUP, rows);
}

static void multiply_some(
    const Convolution *of, int64_t point, int64_t k, const void *x, const float *x_scale, float *sums, int64_t rows
) {
    switch (rows) {
        case 1: multiply(of, point, k, x, x_scale, sums, 1); return;
        case 2: multiply(of, point, k, x, x_scale, sums, 2); return;
        case 3: multiply(of, point, k, x, x_scale, sums, 3); return;
        case 4: multiply(of, point, k, x, x_scale, sums, 4); return;
        case 5: multiply(of, point, k, x, x_scale, sums, 5); return;
        default: multiply(of, point, k, x, x_scale, sums, ROWS);
    }
}

/* Outputs k to k + GROUP of a tile from its sums at all points (ALL, GROUP). */
INLINE void restore_tile(const Convolution *of, Place place, int64_t k, const float *sums) {
    __m512 columns[TILE * POINTS], lines[TILE * TILE], in[POINTS];
    int64_t rows = of->height - place.top, across = of->width - place.left;
    for (int64_t end = k + GROUP; k < end; k += LANES, sums += LANES) {
UNROLL
        for (int q = 0; q < POINTS; q++) {
UNROLL
            for (int p = 0; p < POINTS; p++) in[p] = _mm512_load_ps(sums + (p * POINTS + q) * GROUP);
            restore(columns + q, POINTS, of->after, in);
        }
UNROLL
        for (int p = 0; p < TILE; p++) restore(lines + p * TILE, 1, of->after, columns + p * POINTS);
        __m512 bias = _mm512_loadu_ps(of->bias + k);
        for (int p = 0; p < TILE && p < rows; p++)
            for (int q = 0; q < TILE && q < across; q++) {
                int64_t cell = (place.image * of->height + place.top + p) * of->width + place.left + q;
                int64_t at = cell * of->outputs + k;
                __m512 value = _mm512_add_ps(lines[p * TILE + q], bias);
                if (of->plus) {
                    const char *plus = (const char *)of->plus + at * (of->plus_is_bf16 ? 2 : 4);
                    value = _mm512_add_ps(value, load(plus, of->plus_is_bf16));
                }
                /* in this order what is not a number stays so */
                if (of->relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
                store((char *)of->y + at * (of->y_is_bf16 ? 2 : 4), value, of->y_is_bf16);
            }
    }
}

static int64_t size_of_factor(const Convolution *of) { return of->weight_scale ? sizeof(int16_t) : sizeof(float); }

static int64_t bytes_of(const Convolution *of, int64_t tiles) {
    int64_t of_tile = ALL * (of->channels * size_of_factor(of) + GROUP * sizeof(float) + sizeof(float));
    return ALL * of->channels * sizeof(float) + (tiles * of_tile + 63) / 64 * 64;
}

static void convolve_tiles(const Convolution *of, int64_t first, int64_t tiles, void *memory) {
    float *at_points = memory;                                         /* (ALL, C) */
    float *sums = at_points + ALL * of->channels;                      /* (tiles, ALL, GROUP) */
    char *x = (char *)(sums + tiles * ALL * GROUP);                    /* (ALL, tiles, C) float or int16 */
    int64_t size = of->channels * size_of_factor(of);
    float *x_scale = (float *)(x + ALL * tiles * size);                /* (ALL, tiles) of integers */
    for (int64_t t = 0; t < tiles; t++) {
        Place place = place_of(of, first + t);
        float *into = of->weight_scale ? at_points : (float *)(x + t * size);
        int64_t step = of->weight_scale ? of->channels : tiles * of->channels;
        if (of->x_is_bf16)
            transform_tile(of, place, 1, into, step);
        else
            transform_tile(of, place, 0, into, step);
        for (int64_t p = 0; of->weight_scale && p < ALL; p++) {
            int64_t row = p * tiles + t;
            x_scale[row] = quantise(at_points + p * of->channels, (int16_t *)(x + row * size), of->channels);
        }
    }
    for (int64_t k = 0; k < of->outputs; k += GROUP) {
        for (int64_t p = 0; p < ALL; p++)
            for (int64_t t = 0; t < tiles; t += ROWS) {
                int64_t row = p * tiles + t;
                multiply_some(of, p, k, x + row * size, x_scale + row, sums + (t * ALL + p) * GROUP, tiles - t);
            }
        for (int64_t t = 0; t < tiles; t++) restore_tile(of, place_of(of, first + t), k, sums + t * ALL * GROUP);
    }
}

/* Of what compiled_winograd.py hands over: to be raised with each change, lest a file of before be called. */
int version(void) { return 1; }

/* Whether this processor can run it, with products of float32 and with those of integers. */
int can_multiply_floats(void) {
    return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
int can_multiply_integers(void) {
    return can_multiply_floats() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

/* Zero, or one where memory is short. */
int convolve(const Convolution *of) {
    int64_t tiles = of->images * tiles_along(of->height) * tiles_along(of->width);
    if (!tiles) return 0;
    int64_t blocks = (tiles + MOST_TILES - 1) / MOST_TILES;
    blocks = (blocks + of->threads - 1) / of->threads * of->threads; /* as many for each thread */
    int64_t at_once = (tiles + blocks - 1) / blocks;
    int is_short = 0;
#pragma omp parallel num_threads(of->threads) reduction(| : is_short)
    {
        void *memory = aligned_alloc(64, bytes_of(of, at_once));
        is_short |= !memory;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < tiles; first += at_once)
            if (memory) convolve_tiles(of, first, tiles - first < at_once ? tiles - first : at_once, memory);
        free(memory);
    }
    return is_short;
}
