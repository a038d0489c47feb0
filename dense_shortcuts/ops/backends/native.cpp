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

// A row of a map in the accumulation type, in place or converted into `scratch`.
template <class A>
const A* row_of(const Map& map, const Chunk& chunk, int64_t row, A* scratch) {
  const int64_t n = chunk.columns(), at = chunk.at(row);
  if (map.kind == kind_of<A>()) return static_cast<const A*>(map.data) + at;
  typed(map.data, map.kind, at, [&](auto x) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scratch[j] = A(x[j]);
  });
  return scratch;
}

enum End { NONE, RELU, MASK };

constexpr int64_t TERMS = 8;  // terms added in one pass over a row

// Calls f with m, at most MOST, as a compile-time constant.
template <int64_t MOST, class F>
void with_constant(int64_t m, F f) {
  if constexpr (MOST > 0) {
    if (m < MOST) return with_constant<MOST - 1>(m, f);
  }
  f(std::integral_constant<int, MOST>{});
}

// out = start + sum over M terms of a[m] * x[m], then ReLU or a mask, for a row of n columns; `out` may be one of the x.
// Coefficients are one per column (LAST, channels_last) or one per row. A pass that is not the FIRST adds to `out`. M is
// a compile-time constant so that each term has a load instruction of its own, which the hardware prefetcher follows.
// NaN stays NaN, as in torch.relu.
template <class A, int M, End END, bool LAST, bool FIRST>
void add_terms(int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* out) {
  std::array<const A*, M == 0 ? 1 : M> xs{}, as{};
  for (int m = 0; m < M; ++m) xs[m] = x[m], as[m] = a[m];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    A v = FIRST ? start[LAST ? j : 0] : out[j];
    for (int m = 0; m < M; ++m) v += as[m][LAST ? j : 0] * xs[m][j];
    if (END == RELU) v = v < 0 ? A(0) : v;
    if (END == MASK) v = mask[j] <= 0 ? A(0) : v;
    out[j] = v;
  }
}

// `add_terms` for any number of terms.
template <class A, End END, bool LAST>
void sum_row(int64_t count, int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* out) {
  const auto last = [&](auto m, auto first) {
    add_terms<A, decltype(m)::value, END, LAST, decltype(first)::value>(n, start, x, a, mask, out);
  };
  if (count <= TERMS) return with_constant<TERMS>(count, [&](auto m) { last(m, std::true_type{}); });
  add_terms<A, TERMS, NONE, LAST, true>(n, start, x, a, mask, out);
  for (count -= TERMS, x += TERMS, a += TERMS; count > TERMS; count -= TERMS, x += TERMS, a += TERMS)
    add_terms<A, TERMS, NONE, LAST, false>(n, start, x, a, mask, out);
  with_constant<TERMS>(count, [&](auto m) { last(m, std::false_type{}); });
}

// Adds a row of x * y, or of x if y is null, to the sums over pixels, (C,), which row 0 starts.
template <class A>
void add_products(A* sums, const Chunk& chunk, int64_t row, const A* x, const A* y) {
  const int64_t n = chunk.columns();
  if (chunk.shape.last) {
    if (row == 0) std::fill(sums, sums + n, A(0));
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += y == nullptr ? x[j] : x[j] * y[j];
    return;
  }
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += y == nullptr ? x[j] : x[j] * y[j];
  sums[row] = sum;
}

// Adds a row to the sums, (3, C), from which a chunk's moments are computed: a shift, and the sums of x - shift and of
// its square. The shift is the chunk's first pixel; it avoids cancellation in maps with a large mean.
template <class A>
void add_moments(A* sums, const Chunk& chunk, int64_t row, const A* x) {
  const int64_t n = chunk.columns(), c = chunk.shape.channels;
  A *k = sums, *s = sums + c, *q = sums + 2 * c;
  if (chunk.shape.last) {
    if (row == 0) std::copy(x, x + n, k), std::fill(s, s + 2 * c, A(0));
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A d = x[j] - k[j];
      s[j] += d;
      q[j] += d * d;
    }
    return;
  }
  const A shift = x[0];
  A sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t j = 0; j < n; ++j) {
    const A d = x[j] - shift;
    sum += d;
    square += d * d;
  }
  k[row] = shift, s[row] = sum, q[row] = square;
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
    std::vector<A> converted, out;  // a row of each map in another type
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
    if (is_foreign()) made.converted.resize((terms.size() + 1) * room_of(shape));
    if (kind != kind_of<A>()) made.out.resize(room_of(shape));
    return made;
  }

  // One chunk into `out`. Where they are not null, `moments`, (3, C), takes the sums of `add_moments`, and `products`,
  // (others + 1, C), those of `add_products`.
  void run(const Chunk& chunk, void* out, int64_t kind, A* moments, A* products, Scratch& scratch) const {
    for (int64_t row = 0; row < chunk.rows(); ++row) {
      const A* done = run_row(chunk, row, out, kind, scratch);
      if (moments != nullptr)  // of the values as stored, which may have been rounded
        add_moments(moments, chunk, row, row_of(Map{out, kind}, chunk, row, scratch.out.data()));
      if (products == nullptr) continue;
      A* sums = products;
      for (const Map& other : others) {
        add_products(sums, chunk, row, done, row_of(other, chunk, row, scratch.converted.data()));
        sums += shape.channels;
      }
      add_products<A>(sums, chunk, row, done, nullptr);
    }
  }

  // A row of a chunk; returns it in the accumulation type.
  const A* run_row(const Chunk& chunk, int64_t row, void* out, int64_t kind, Scratch& scratch) const {
    A* slot = scratch.converted.data();
    const auto taken = [&](const Map& map) {
      const A* x = row_of(map, chunk, row, slot);
      if (x == slot) slot += room_of(shape);
      return x;
    };
    for (size_t i = 0; i < terms.size(); ++i) {
      scratch.x[i] = taken(terms[i].map);
      scratch.a[i] = coefficient(static_cast<const A*>(terms[i].scale), terms[i].rows, chunk, row);
    }
    const A *from = coefficient(start, start_rows, chunk, row), *masks = mask.data == nullptr ? nullptr : taken(mask);
    A* to = kind == kind_of<A>() ? static_cast<A*>(out) + chunk.at(row) : scratch.out.data();
    if (shape.last) add_row<true>(chunk.columns(), from, masks, to, scratch);
    else add_row<false>(chunk.columns(), from, masks, to, scratch);
    put(out, kind, chunk, row, to);
    return to;
  }

  template <bool LAST>
  void add_row(int64_t n, const A* from, const A* masks, A* to, const Scratch& scratch) const {
    const A *const *x = scratch.x.data(), *const *a = scratch.a.data();
    if (masks != nullptr) sum_row<A, MASK, LAST>(terms.size(), n, from, x, a, masks, to);
    else if (relu) sum_row<A, RELU, LAST>(terms.size(), n, from, x, a, nullptr, to);
    else sum_row<A, NONE, LAST>(terms.size(), n, from, x, a, nullptr, to);
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
  std::vector<A> sums(3 * c), converted(x.kind == kind_of<A>() ? 0 : room_of(shape));
#pragma omp for
  for (int64_t index = 0; index < shape.chunks(); ++index) {
    const Chunk chunk(shape, index);
    for (int64_t row = 0; row < chunk.rows(); ++row)
      add_moments(sums.data(), chunk, row, row_of(x, chunk, row, converted.data()));
    write_moments(sums.data(), c, chunk.pixels, parts + index * 2 * c);
  }
}

// Computes a sum over all chunks, and where they are not null the moments of each, (chunks, 2, C), and the products,
// (chunks, others + 1, C). With static scheduling, a thread gets the same chunks in every pass.
template <class A>
void team_sum(const Sum<A>& sum, void* out, int64_t kind, double* moments, A* products) {
  const Shape& shape = sum.shape;
  const int64_t c = shape.channels, chunks = shape.chunks(), terms = sum.others.size() + 1;
  typename Sum<A>::Scratch scratch = sum.scratch(kind);
  std::vector<A> sums(moments == nullptr ? 0 : 3 * c);
#pragma omp for
  for (int64_t index = 0; index < chunks; ++index) {
    const Chunk chunk(shape, index);
    A* to = products == nullptr ? nullptr : products + index * terms * c;
    sum.run(chunk, out, kind, moments == nullptr ? nullptr : sums.data(), to, scratch);
    if (moments != nullptr) write_moments(sums.data(), c, chunk.pixels, moments + index * 2 * c);
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
    team_sum<A>(sum, out, args.out.kind, statistics ? parts.get() : nullptr, nullptr);
    if (statistics) team_image_moments(shape, parts.get(), static_cast<A*>(args.mean), static_cast<A*>(args.var));
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
    team_sum<A>(sum, args.out, args.x.kind, nullptr, args.rows ? parts.get() : nullptr);
    if (args.rows)
      team_merge(shape, parts.get(), terms, args.rows, static_cast<A*>(args.grad_scales),
                 static_cast<A*>(args.grad_bias));
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
      for (int64_t row = 0; row < chunk.rows(); ++row)  // which stays in cache for all outputs
        for (int64_t o = 0; o < args.num_outputs; ++o)
          sums[o].run_row(chunk, row, const_cast<void*>(args.outputs[o].data), args.outputs[o].kind, scratch);
    }
  }
}

template <class A>
void dots(const DotsArgs& args) {
  const Shape shape(args);
  const int64_t c = shape.channels, terms = args.num_grads * args.num_maps, room = room_of(shape);
  const auto parts = room_for<A>(shape.chunks() * terms * c);
#pragma omp parallel num_threads(args.threads)
  {
    std::vector<A> buffer((args.num_grads + 1) * room);
    std::vector<const A*> taken(args.num_grads);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      A* sums = parts.get() + index * terms * c;
      for (int64_t row = 0; row < chunk.rows(); ++row) {
        for (int64_t g = 0; g < args.num_grads; ++g)
          taken[g] = row_of(args.grads[g], chunk, row, buffer.data() + g * room);
        for (int64_t i = 0; i < args.num_maps; ++i) {
          const A* x = row_of(args.maps[i], chunk, row, buffer.data() + args.num_grads * room);
          for (int64_t g = 0; g < args.num_grads; ++g)
            add_products(sums + (g * args.num_maps + i) * c, chunk, row, taken[g], x);
        }
      }
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
