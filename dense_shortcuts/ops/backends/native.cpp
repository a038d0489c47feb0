// The five map-sized passes for the CPU, as specified in reference.py and called by native.py.
//
// A map is (N, C, P) or, in channels_last, (N, P, C), with P = H * W. Work is split into chunks of at most CHUNK pixels
// of one image. One thread processes a chunk row by row, so every map is read from memory once and every output written
// once. Sums over pixels are in the accumulation type A within a chunk and in double across chunks, in a fixed order:
// results do not depend on the number of threads. This source is compiled for several instruction sets (setup.py).
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t CHUNK = 512;  // pixels of one image that are summed without double precision
constexpr int64_t GROUP = 4;    // rows held in registers in one pass

enum Kind : int64_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

struct bfloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  bfloat16() = default;
  explicit bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    // round to nearest even; a NaN keeps its sign and stays a NaN
    bits = value != value ? uint16_t((wide >> 16) | 0x40) : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
};

#ifdef __FLT16_MAX__
using half = _Float16;
#define WITH_HALF(...) __VA_ARGS__
#else
#define WITH_HALF(...)
#endif

// Calls f with a typed pointer to element `at` of a tensor.
template <class F>
inline void typed(const void* data, int64_t kind, int64_t at, F f) {
  if (kind == F32) f(static_cast<const float*>(data) + at);
  else if (kind == F64) f(static_cast<const double*>(data) + at);
  else if (kind == BF16) f(static_cast<const bfloat16*>(data) + at);
  WITH_HALF(else if (kind == F16) f(static_cast<const half*>(data) + at);)
}

template <class A>
constexpr int64_t kind_of() { return sizeof(A) == 4 ? F32 : F64; }

// The arguments of each pass, with the same fields as in native.py; both are compared when the library is loaded.
#define DECLARE(type, name) type name;
#define DESCRIBE(type, name) text += " " #name "@" + std::to_string(offsetof(Self, name));
#define STRUCT(Name, FIELDS)                             \
  struct Name {                                          \
    FIELDS(DECLARE)                                      \
    static void describe(std::string& text) {            \
      using Self = Name;                                 \
      text += #Name " " + std::to_string(sizeof(Name));  \
      FIELDS(DESCRIBE)                                   \
      text += "\n";                                      \
    }                                                    \
  };

#define MAP(F) F(const void*, data) F(int64_t, kind)
STRUCT(Map, MAP)

// A map with its coefficients, (rows, C); a null pointer means ones.
#define TERM(F) F(Map, map) F(const void*, scale) F(int64_t, rows)
STRUCT(Term, TERM)

#define SHAPE(F) \
  F(int64_t, threads) F(int64_t, images) F(int64_t, channels) F(int64_t, pixels) F(int64_t, channels_last)

#define MOMENTS_ARGS(F) SHAPE(F) F(Map, x) F(void*, mean) F(void*, var)
STRUCT(MomentsArgs, MOMENTS_ARGS)

#define JOIN_ARGS(F)                                                                                           \
  SHAPE(F) F(const Term*, terms) F(int64_t, num_terms) F(const void*, bias) F(int64_t, bias_rows)              \
  F(int64_t, relu) F(Map, out) F(void*, mean) F(void*, var)
STRUCT(JoinArgs, JOIN_ARGS)

#define PULL_ARGS(F)                                                                                           \
  SHAPE(F) F(Map, x) F(Map, grad) F(const void*, offset) F(const void*, slope) F(int64_t, moved_rows)          \
  F(const Term*, later) F(int64_t, num_later) F(const Map*, maps) F(int64_t, num_maps) F(int64_t, rows)        \
  F(int64_t, relu) F(void*, out) F(void*, grad_scales) F(void*, grad_bias)
STRUCT(PullArgs, PULL_ARGS)

#define MIX_ARGS(F)                                                                                            \
  SHAPE(F) F(const Map*, maps) F(int64_t, num_maps) F(const Map*, outputs) F(int64_t, num_outputs)             \
  F(const void*, scales) F(int64_t, rows)
STRUCT(MixArgs, MIX_ARGS)

#define DOTS_ARGS(F)                                                                                           \
  SHAPE(F) F(const Map*, grads) F(int64_t, num_grads) F(const Map*, maps) F(int64_t, num_maps)                 \
  F(int64_t, rows) F(void*, out)
STRUCT(DotsArgs, DOTS_ARGS)

// An uninitialised array, every element of which is written before it is read.
template <class T>
std::unique_ptr<T[]> room_for(int64_t count) { return std::unique_ptr<T[]>(new T[count]); }

struct Shape {
  int64_t images, channels, pixels;
  bool last;  // channels_last

  template <class Args>
  explicit Shape(const Args& args)
      : images(args.images), channels(args.channels), pixels(args.pixels), last(args.channels_last) {}
  int64_t splits() const { return std::max<int64_t>(1, (pixels + CHUNK - 1) / CHUNK); }
  int64_t chunks() const { return images * splits(); }
  int64_t each() const { return (pixels + splits() - 1) / splits(); }
};

// Length of a buffer that can hold a row in either layout.
int64_t room_of(const Shape& shape) { return std::max(shape.channels, CHUNK); }

int64_t chunk_pixels(const Shape& shape, int64_t split) {
  return std::min(shape.each(), shape.pixels - split * shape.each());
}

// Some pixels of an image, as rows: a pixel with all its channels (channels_last), or a channel with all these pixels.
struct Chunk {
  const Shape& shape;
  int64_t image, first, pixels;

  Chunk(const Shape& shape, int64_t index)
      : shape(shape), image(index / shape.splits()), first(index % shape.splits() * shape.each()),
        pixels(chunk_pixels(shape, index % shape.splits())) {}
  int64_t rows() const { return shape.last ? pixels : shape.channels; }
  int64_t columns() const { return shape.last ? shape.channels : pixels; }
  int64_t at(int64_t row) const {
    const int64_t base = image * shape.channels * shape.pixels;
    return shape.last ? base + (first + row) * shape.channels : base + row * shape.pixels + first;
  }
};

// Address of the coefficient, from (rows, C), for the first column of a row of a chunk.
template <class A>
const A* coefficient(const A* data, int64_t rows, const Chunk& chunk, int64_t row) {
  if (rows > 1) data += chunk.image * chunk.shape.channels;
  return chunk.shape.last ? data : data + row;
}

// Converts a computed row to the output's type and writes it; does nothing if the output is in the accumulation type.
template <class A>
void put(void* out, int64_t kind, const Chunk& chunk, int64_t row, const A* from) {
  if (kind == kind_of<A>()) return;
  typed(out, kind, chunk.at(row), [&](auto x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    T* y = const_cast<T*>(x);
    const int64_t n = chunk.columns();
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = T(from[j]);
  });
}

// Up to GROUP rows of a map in the accumulation type, in place or converted into `scratch`: the first row, and the
// distance from one row to the next.
template <class A>
struct Rows {
  const A* first;
  int64_t stride;
  const A* operator[](int64_t r) const { return first + r * stride; }
};

template <class A>
Rows<A> rows_of(const Map& map, const Chunk& chunk, int64_t row, int64_t rows, A* scratch) {
  const int64_t n = chunk.columns(), at = chunk.at(row);
  if (map.kind == kind_of<A>())
    return {static_cast<const A*>(map.data) + at, chunk.shape.last ? chunk.shape.channels : chunk.shape.pixels};
  for (int64_t r = 0; r < rows; ++r)
    typed(map.data, map.kind, chunk.at(row + r), [&](auto x) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) scratch[r * n + j] = A(x[j]);
    });
  return {scratch, n};
}

enum End { NONE, RELU, MASK };
enum More { NOTHING, MOMENTS, PRODUCTS };

// Bytes in a vector register of the instruction set.
#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
template <class A>
struct Wide {
  typedef A type __attribute__((vector_size(WIDTH)));
};

template <class T, class A>
inline T load(const A* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T, class A>
inline void store(A* to, const T& value) { std::memcpy(to, &value, sizeof(T)); }

// 0 where x is negative, or where the mask is not positive; NaN stays NaN, as in torch.relu.
template <class T>
inline T positive(const T& x) { return x < T{} ? T{} : x; }
template <class T>
inline T masked(const T& x, const T& mask) { return mask <= T{} ? T{} : x; }

constexpr int64_t TERMS = 8;  // terms added in one pass over registers

// Calls f with m, at most MOST, as a compile-time constant.
template <int64_t MOST, class F>
void with_constant(int64_t m, F f) {
  if constexpr (MOST > 0) {
    if (m < MOST) return with_constant<MOST - 1>(m, f);
  }
  f(std::integral_constant<int, MOST>{});
}

// R rows of channels_last maps, n apart, one vector T per row from column j on: out = start + sum over M terms of a[m]
// * x[m], then ReLU or a mask. `start` is one row for all rows, or has rows n apart too. With MOMENTS, `sums` are those
// of `add_moments`, and `fresh` starts them. The R rows share each loaded coefficient. M is a compile-time constant so
// that each term has a load instruction of its own, which the hardware prefetcher follows.
template <class T, int R, int M, End END, More MORE, class A>
inline void sum_at(int64_t n, int64_t j, const A* start, int64_t start_stride, const A* const* x, const A* const* a,
                   const A* mask, A* out, A* sums, bool fresh) {
  T v[R];
  for (int r = 0; r < R; ++r) v[r] = load<T>(start + j + r * start_stride);
  for (int m = 0; m < M; ++m) {
    const T scale = load<T>(a[m] + j);
    for (int r = 0; r < R; ++r) v[r] += scale * load<T>(x[m] + j + r * n);
  }
  for (int r = 0; r < R; ++r) {
    if (END == RELU) v[r] = positive(v[r]);
    if (END == MASK) v[r] = masked(v[r], load<T>(mask + j + r * n));
    store(out + j + r * n, v[r]);
  }
  if (MORE != MOMENTS) return;
  const T shift = fresh ? v[0] : load<T>(sums + j);
  T sum{}, square{};
  for (int r = 0; r < R; ++r) {
    const T d = v[r] - shift;
    sum += d, square += d * d;
  }
  if (fresh) store(sums + j, shift);
  store(sums + n + j, fresh ? sum : load<T>(sums + n + j) + sum);
  store(sums + 2 * n + j, fresh ? square : load<T>(sums + 2 * n + j) + square);
}

template <class A, int M, int R, End END, More MORE>
void sum_rows(int64_t n, const A* start, int64_t start_stride, const A* const* x, const A* const* a, const A* mask,
              A* out, A* sums, bool fresh) {
  using V = typename Wide<A>::type;
  constexpr int64_t step = sizeof(V) / sizeof(A);
  std::array<const A*, M == 0 ? 1 : M> xs{}, as{};
  for (int m = 0; m < M; ++m) xs[m] = x[m], as[m] = a[m];
  int64_t j = 0;
  for (; j + step <= n; j += step)
    sum_at<V, R, M, END, MORE>(n, j, start, start_stride, xs.data(), as.data(), mask, out, sums, fresh);
  for (; j < n; ++j)
    sum_at<A, R, M, END, MORE>(n, j, start, start_stride, xs.data(), as.data(), mask, out, sums, fresh);
}

// R rows of a sum of channels_last maps. Single rows, of which a chunk has few, take one term per pass: less to compile.
template <class A, int R, End END, More MORE>
void sum_group(int64_t count, int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* out,
               A* sums, bool fresh) {
  constexpr int64_t terms = R == 1 ? 1 : TERMS;
  int64_t stride = 0;
  for (; count > terms; count -= terms, x += terms, a += terms, start = out, stride = n)
    sum_rows<A, terms, R, End::NONE, NOTHING>(n, start, stride, x, a, mask, out, sums, fresh);
  with_constant<terms>(count, [&](auto m) {
    sum_rows<A, decltype(m)::value, R, END, MORE>(n, start, stride, x, a, mask, out, sums, fresh);
  });
}

// acc = start + sum of a[m] * x[m], then ReLU or a mask, for a row of contiguous maps: pixels of one channel, so each
// map has one coefficient. The row stays in the L1 cache from term to term.
template <class A, End END>
void sum_row(int64_t count, int64_t n, A start, const A* const* x, const A* const* a, const A* mask, A* acc) {
  if (count == 0) std::fill(acc, acc + n, start);
  for (int64_t m = 0; m < count; ++m) {  // acc may be the first map
    const A scale = *a[m], *from = x[m];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) acc[j] = (m == 0 ? start : acc[j]) + scale * from[j];
  }
  if (END == End::NONE) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) acc[j] = END == RELU ? positive(acc[j]) : masked(acc[j], mask[j]);
}

// sums[c] += sum over rows of x * y, or of x if y is null; `fresh` starts the sums at zero.
template <class A>
void add_products(A* sums, bool fresh, const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& x,
                  const Rows<A>* y) {
  const int64_t n = chunk.columns();
  if (chunk.shape.last && fresh) std::fill(sums, sums + n, A(0));
  for (int64_t r = 0; r < rows; ++r) {
    const A *from = x[r], *with = y == nullptr ? nullptr : (*y)[r];
    if (chunk.shape.last) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sums[j] += with == nullptr ? from[j] : from[j] * with[j];
      continue;
    }
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += with == nullptr ? from[j] : from[j] * with[j];
    sums[row + r] = sum;
  }
}

// Adds some rows of a map to the sums, (3, C), from which a chunk's moments are computed: a shift, and the sums of
// x - shift and of its square. The shift is the chunk's first pixel; it avoids cancellation in maps with a large mean.
template <class A>
void add_moments(A* sums, const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& x) {
  const int64_t n = chunk.columns(), c = chunk.shape.channels;
  A *k = sums, *s = sums + c, *q = sums + 2 * c;
  if (chunk.shape.last && row == 0) {
    std::copy(x[0], x[0] + n, k);
    std::fill(s, s + 2 * c, A(0));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const A* from = x[r];
    if (chunk.shape.last) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A d = from[j] - k[j];
        s[j] += d;
        q[j] += d * d;
      }
      continue;
    }
    const A shift = from[0];
    A sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
    for (int64_t j = 0; j < n; ++j) {
      const A d = from[j] - shift;
      sum += d;
      square += d * d;
    }
    k[row + r] = shift, s[row + r] = sum, q[row + r] = square;
  }
}

// Calls f(row, rows) over the rows of a chunk: GROUP at a time, then one by one.
template <class F>
void by_groups(const Chunk& chunk, F f) {
  for (int64_t row = 0, rows; row < chunk.rows(); row += rows) {
    rows = chunk.rows() - row >= GROUP ? GROUP : 1;
    f(row, rows);
  }
}

// Mean, and sum of squared deviations from it, of each channel of a chunk, (2, C), from the sums of `add_moments`.
template <class A>
void write_moments(const A* sums, int64_t c, int64_t pixels, double* to) {
  const A *shift = sums, *sum = sums + c, *square = sums + 2 * c;
  const double inverse = 1 / double(pixels);
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    const double s = sum[j], rest = square[j] - s * s * inverse;
    to[j] = shift[j] + s * inverse;
    to[c + j] = rest < 0 ? 0 : rest;  // keeps NaN
  }
}

// A weighted sum of maps.
template <class A>
struct Sum {
  const Shape& shape;
  const A* start;  // (start_rows, C)
  int64_t start_rows;
  std::vector<Term> terms{};  // each with coefficients
  std::vector<Map> others{};  // maps whose products with the sum are computed
  Map mask{nullptr, kind_of<A>()};
  bool relu = false;

  // Buffers of one thread.
  struct Scratch {
    std::vector<const A*> x, a;
    std::vector<A> converted, out;  // GROUP rows of each map in another type
  };

  // Whether some map is not in the accumulation type, so its rows must be converted.
  bool is_foreign() const {
    const auto foreign = [](const Map& map) { return map.kind != kind_of<A>(); };
    return (mask.data != nullptr && foreign(mask)) || std::any_of(others.begin(), others.end(), foreign) ||
           std::any_of(terms.begin(), terms.end(), [&](const Term& term) { return foreign(term.map); });
  }

  Scratch scratch(int64_t kind) const {
    Scratch made;
    made.x.resize(terms.size()), made.a.resize(terms.size());
    if (is_foreign()) made.converted.resize((terms.size() + 1) * GROUP * room_of(shape));
    if (kind != kind_of<A>()) made.out.resize(GROUP * room_of(shape));
    return made;
  }

  // One chunk: writes the rows to `out`, and to `sums`, depending on MORE, (3, C) for MOMENTS or (others + 1, C) for
  // PRODUCTS.
  template <More MORE>
  void run(const Chunk& chunk, void* out, int64_t kind, A* sums, Scratch& scratch) const {
    by_groups(chunk, [&](int64_t row, int64_t rows) { run_rows<MORE>(chunk, row, rows, out, kind, sums, scratch); });
  }

  // GROUP rows of a chunk, or a single one.
  template <More MORE>
  void run_rows(const Chunk& chunk, int64_t row, int64_t rows, void* out, int64_t kind, A* sums,
                Scratch& scratch) const {
    const bool stored = kind == kind_of<A>();
    const Rows<A> done =
        stored ? rows_of<A>(Map{out, kind}, chunk, row, rows, nullptr) : Rows<A>{scratch.out.data(), chunk.columns()};
    // moments are of the values as stored, which may have been rounded
    constexpr More WHILE = MORE == PRODUCTS ? PRODUCTS : NOTHING;
    if (shape.last && stored) run_last<MORE>(chunk, row, rows, done, sums, scratch);
    else if (shape.last) run_last<WHILE>(chunk, row, rows, done, sums, scratch);
    else run_contiguous<WHILE>(chunk, row, rows, done, sums, scratch);
    if (!stored)
      for (int64_t r = 0; r < rows; ++r) put(out, kind, chunk, row + r, done[r]);
    if (MORE == MOMENTS && !(shape.last && stored))
      add_moments(sums, chunk, row, rows, rows_of(Map{out, kind}, chunk, row, rows, scratch.out.data()));
  }

  template <More MORE>
  void run_last(const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& done, A* sums, Scratch& scratch) const {
    if (mask.data != nullptr) run_group<MORE, MASK>(chunk, row, rows, done, sums, scratch);
    else if (relu) run_group<MORE, RELU>(chunk, row, rows, done, sums, scratch);
    else run_group<MORE, End::NONE>(chunk, row, rows, done, sums, scratch);
    if (MORE == PRODUCTS) add_all_products(chunk, row, rows, done, sums, scratch);
  }

  template <More MORE, End END>
  void run_group(const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& done, A* sums, Scratch& scratch) const {
    A* slot = scratch.converted.data();
    const auto taken = [&](const Map& map) {
      const A* first = rows_of(map, chunk, row, rows, slot).first;
      if (!scratch.converted.empty()) slot += GROUP * room_of(shape);
      return first;
    };
    for (size_t i = 0; i < terms.size(); ++i) {
      scratch.x[i] = taken(terms[i].map);
      scratch.a[i] = coefficient(static_cast<const A*>(terms[i].scale), terms[i].rows, chunk, row);
    }
    const A *from = coefficient(start, start_rows, chunk, row), *masks = END == MASK ? taken(mask) : nullptr;
    const A *const *x = scratch.x.data(), *const *a = scratch.a.data();
    constexpr More WHILE = MORE == MOMENTS ? MOMENTS : NOTHING;
    const int64_t count = terms.size(), n = chunk.columns();
    A* out = const_cast<A*>(done.first);
    if (rows == GROUP) sum_group<A, GROUP, END, WHILE>(count, n, from, x, a, masks, out, sums, row == 0);
    else sum_group<A, 1, END, WHILE>(count, n, from, x, a, masks, out, sums, row == 0);
  }

  template <More MORE>
  void run_contiguous(const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& done, A* sums,
                      Scratch& scratch) const {
    const int64_t n = chunk.columns(), room = room_of(shape);
    for (int64_t r = 0; r < rows; ++r) {
      A* slot = scratch.converted.data();
      for (size_t i = 0; i < terms.size(); ++i, slot += room) {
        scratch.x[i] = rows_of(terms[i].map, chunk, row + r, 1, slot).first;
        scratch.a[i] = coefficient(static_cast<const A*>(terms[i].scale), terms[i].rows, chunk, row + r);
      }
      const A from = *coefficient(start, start_rows, chunk, row + r);
      const A* masks = mask.data == nullptr ? nullptr : rows_of(mask, chunk, row + r, 1, slot).first;
      const A *const *x = scratch.x.data(), *const *a = scratch.a.data();
      A* acc = const_cast<A*>(done[r]);
      if (masks != nullptr) sum_row<A, MASK>(terms.size(), n, from, x, a, masks, acc);
      else if (relu) sum_row<A, RELU>(terms.size(), n, from, x, a, nullptr, acc);
      else sum_row<A, End::NONE>(terms.size(), n, from, x, a, nullptr, acc);
    }
    if (MORE == PRODUCTS) add_all_products(chunk, row, rows, done, sums, scratch);
  }

  void add_all_products(const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& done, A* sums,
                        Scratch& scratch) const {
    for (size_t i = 0; i < others.size(); ++i) {
      const Rows<A> other = rows_of(others[i], chunk, row, rows, scratch.converted.data());
      add_products(sums + i * shape.channels, row == 0, chunk, row, rows, done, &other);
    }
    add_products<A>(sums + others.size() * shape.channels, row == 0, chunk, row, rows, done, nullptr);
  }
};

constexpr int64_t BLOCK = 64;  // channels that a thread processes at a time

// All functions named team_* are called by every thread of a parallel region, and share the work among the threads.

// Adds up the sums of chunks, (chunks, terms, C), to (terms, rows, C): the last term goes to `last`, the others to
// `out`.
template <class A>
void team_merge(const Shape& shape, const A* parts, int64_t terms, int64_t rows, A* out, A* last) {
  const int64_t c = shape.channels, per_row = rows > 1 ? shape.splits() : shape.chunks();
  const int64_t blocks = (c + BLOCK - 1) / BLOCK;
#pragma omp for
  for (int64_t unit = 0; unit < terms * rows * blocks; ++unit) {
    const int64_t from = unit % blocks * BLOCK, n = std::min(BLOCK, c - from);
    const int64_t row = unit / blocks % rows, term = unit / blocks / rows;
    double total[BLOCK] = {};
    for (int64_t k = 0; k < per_row; ++k) {
      const A* part = parts + ((row * per_row + k) * terms + term) * c + from;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) total[j] += part[j];
    }
    A* to = (last != nullptr && term == terms - 1 ? last : out + term * rows * c) + row * c + from;
    for (int64_t j = 0; j < n; ++j) to[j] = A(total[j]);
  }
}

// Moments of each chunk of a map, (chunks, 2, C).
template <class A>
void team_moments(const Shape& shape, const Map& x, double* parts) {
  const int64_t c = shape.channels;
  std::vector<A> sums(3 * c), converted(x.kind == kind_of<A>() ? 0 : GROUP * room_of(shape));
#pragma omp for
  for (int64_t index = 0; index < shape.chunks(); ++index) {
    const Chunk chunk(shape, index);
    by_groups(chunk, [&](int64_t row, int64_t rows) {
      add_moments(sums.data(), chunk, row, rows, rows_of(x, chunk, row, rows, converted.data()));
    });
    write_moments(sums.data(), c, chunk.pixels, parts + index * 2 * c);
  }
}

// Computes a sum over all chunks. With static scheduling, a thread gets the same chunks in every pass.
template <More MORE, class A>
void team_sum(const Sum<A>& sum, void* out, int64_t kind, double* moments, A* products) {
  const Shape& shape = sum.shape;
  const int64_t c = shape.channels, chunks = shape.chunks(), terms = sum.others.size() + 1;
  typename Sum<A>::Scratch scratch = sum.scratch(kind);
  std::vector<A> sums(MORE == MOMENTS ? 3 * c : 0);
#pragma omp for
  for (int64_t index = 0; index < chunks; ++index) {
    const Chunk chunk(shape, index);
    A* to = MORE == PRODUCTS ? products + index * terms * c : sums.data();
    sum.template run<MORE>(chunk, out, kind, to, scratch);
    if (MORE == MOMENTS) write_moments(to, c, chunk.pixels, moments + index * 2 * c);
  }
}

// Moments of each image, (N, C), from those of its chunks, (chunks, 2, C), by the law of total variance.
template <class A>
void team_image_moments(const Shape& shape, const double* parts, A* mean, A* var) {
  const int64_t c = shape.channels, splits = shape.splits();
#pragma omp for
  for (int64_t unit = 0; unit < shape.images * c; ++unit) {
    const double* part = parts + unit / c * splits * 2 * c + unit % c;
    double sum = 0, about = 0;
    for (int64_t k = 0; k < splits; ++k) sum += part[k * 2 * c] * chunk_pixels(shape, k);
    const double whole = sum / shape.pixels;
    for (int64_t k = 0; k < splits; ++k) {
      const double between = part[k * 2 * c] - whole;
      about += part[k * 2 * c + c] + between * between * chunk_pixels(shape, k);
    }
    mean[unit] = A(whole), var[unit] = A(about / shape.pixels);
  }
}

// The five passes.

template <class A>
void moments(const MomentsArgs& args) {
  const Shape shape(args);
  const auto parts = room_for<double>(shape.chunks() * 2 * shape.channels);
#pragma omp parallel num_threads(args.threads)
  {
    team_moments<A>(shape, args.x, parts.get());
    team_image_moments(shape, parts.get(), static_cast<A*>(args.mean), static_cast<A*>(args.var));
  }
}

// Zeros and ones, in place of starts and coefficients that are null.
template <class A>
struct Defaults {
  std::vector<A> zeros, ones;

  explicit Defaults(const Shape& shape) : zeros(shape.channels), ones(shape.channels, A(1)) {}
  Sum<A> sum(const Shape& shape, const void* start, int64_t rows) const {
    return {shape, start == nullptr ? zeros.data() : static_cast<const A*>(start), start == nullptr ? 1 : rows};
  }
  Term term(Term given) const { return given.scale == nullptr ? Term{given.map, ones.data(), 1} : given; }
};

template <class A>
void join(const JoinArgs& args) {
  const Shape shape(args);
  const Defaults<A> defaults(shape);
  Sum<A> sum = defaults.sum(shape, args.bias, args.bias_rows);
  sum.relu = args.relu;
  for (int64_t i = 0; i < args.num_terms; ++i) sum.terms.push_back(defaults.term(args.terms[i]));
  const bool statistics = args.mean != nullptr;
  const auto parts = room_for<double>(statistics ? shape.chunks() * 2 * shape.channels : 0);
  void* out = const_cast<void*>(args.out.data);
#pragma omp parallel num_threads(args.threads)
  {
    if (statistics) {
      team_sum<MOMENTS>(sum, out, args.out.kind, parts.get(), static_cast<A*>(nullptr));
      team_image_moments(shape, parts.get(), static_cast<A*>(args.mean), static_cast<A*>(args.var));
    } else {
      team_sum<NOTHING>(sum, out, args.out.kind, nullptr, static_cast<A*>(nullptr));
    }
  }
}

template <class A>
void pull(const PullArgs& args) {
  const Shape shape(args);
  const Defaults<A> defaults(shape);
  Sum<A> sum = defaults.sum(shape, args.offset, args.moved_rows);
  if (args.grad.data != nullptr) sum.terms.push_back(defaults.term({args.grad, nullptr, 1}));
  if (args.slope != nullptr) sum.terms.push_back({args.x, args.slope, args.moved_rows});
  sum.terms.insert(sum.terms.end(), args.later, args.later + args.num_later);
  sum.others.assign(args.maps, args.maps + args.num_maps);
  if (args.relu) sum.mask = args.x;
  const int64_t terms = args.num_maps + 1;
  const auto parts = room_for<A>(args.rows ? shape.chunks() * terms * shape.channels : 0);
#pragma omp parallel num_threads(args.threads)
  {
    if (args.rows) {
      team_sum<PRODUCTS>(sum, args.out, args.x.kind, nullptr, parts.get());
      team_merge(shape, parts.get(), terms, args.rows, static_cast<A*>(args.grad_scales),
                 static_cast<A*>(args.grad_bias));
    } else {
      team_sum<NOTHING>(sum, args.out, args.x.kind, nullptr, static_cast<A*>(nullptr));
    }
  }
}

template <class A>
void mix(const MixArgs& args) {
  const Shape shape(args);
  const Defaults<A> defaults(shape);
  const int64_t each = args.rows * shape.channels;
  const A* scales = static_cast<const A*>(args.scales);  // (outputs, maps, rows, C)
  std::vector<Sum<A>> sums(args.num_outputs, defaults.sum(shape, nullptr, 1));
  for (int64_t o = 0; o < args.num_outputs; ++o)
    for (int64_t i = 0; i < args.num_maps; ++i)
      sums[o].terms.push_back({args.maps[i], scales + (o * args.num_maps + i) * each, args.rows});
#pragma omp parallel num_threads(args.threads)
  {
    typename Sum<A>::Scratch scratch = sums[0].scratch(args.outputs[0].kind);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      by_groups(chunk, [&](int64_t row, int64_t group) {  // rows of the maps stay in cache for all outputs
        for (int64_t o = 0; o < args.num_outputs; ++o)
          sums[o].template run_rows<NOTHING>(chunk, row, group, const_cast<void*>(args.outputs[o].data),
                                             args.outputs[o].kind, nullptr, scratch);
      });
    }
  }
}

template <class A>
void dots(const DotsArgs& args) {
  const Shape shape(args);
  const int64_t c = shape.channels, terms = args.num_grads * args.num_maps, room = GROUP * room_of(shape);
  const auto parts = room_for<A>(shape.chunks() * terms * c);
#pragma omp parallel num_threads(args.threads)
  {
    std::vector<A> buffer((args.num_grads + 1) * room);
    std::vector<Rows<A>> taken(args.num_grads);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      A* sums = parts.get() + index * terms * c;
      by_groups(chunk, [&](int64_t row, int64_t group) {
        for (int64_t g = 0; g < args.num_grads; ++g)
          taken[g] = rows_of(args.grads[g], chunk, row, group, buffer.data() + g * room);
        for (int64_t i = 0; i < args.num_maps; ++i) {
          const Rows<A> x = rows_of(args.maps[i], chunk, row, group, buffer.data() + args.num_grads * room);
          for (int64_t g = 0; g < args.num_grads; ++g)
            add_products(sums + (g * args.num_maps + i) * c, row == 0, chunk, row, group, taken[g], &x);
        }
      });
    }
    team_merge(shape, parts.get(), terms, args.rows, static_cast<A*>(args.out), static_cast<A*>(nullptr));
  }
}

}  // namespace

extern "C" {

// Every structure with its size and field offsets, one line each.
const char* dense_shortcuts_schema() {
  static const std::string schema = [] {
    std::string text;
    Map::describe(text), Term::describe(text), MomentsArgs::describe(text), JoinArgs::describe(text);
    PullArgs::describe(text), MixArgs::describe(text), DotsArgs::describe(text);
    return text;
  }();
  return schema.c_str();
}

int dense_shortcuts_has_half() {
#ifdef __FLT16_MAX__
  return 1;
#else
  return 0;
#endif
}

#define EXPORT(name, Args)                                      \
  void name##_f32(const Args* args) { name<float>(*args); }     \
  void name##_f64(const Args* args) { name<double>(*args); }

EXPORT(moments, MomentsArgs)
EXPORT(join, JoinArgs)
EXPORT(pull, PullArgs)
EXPORT(mix, MixArgs)
EXPORT(dots, DotsArgs)
}
