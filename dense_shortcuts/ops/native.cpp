// The kernels of the operator for the CPU: see reference.py for what each one computes and compiled.py for how they are
// built.
//
// A map is (N, C, P) or, channels_last, (N, P, C), with P = H * W. Work is cut into chunks of at most CHUNK pixels of
// one image, each done by one thread row by row: every map is read from memory once and every output written once. Sums
// over pixels run in the accumulation type A within a chunk and in double across chunks, in a fixed order, so that
// results do not depend on the number of threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t CHUNK = 512;  // pixels of one image summed without going to double
constexpr int64_t GROUP = 4;    // rows taken in one pass over registers

enum Kind : int32_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

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
inline void typed(const void* data, int32_t kind, int64_t at, F f) {
  if (kind == F32) f(static_cast<const float*>(data) + at);
  else if (kind == F64) f(static_cast<const double*>(data) + at);
  else if (kind == BF16) f(static_cast<const bfloat16*>(data) + at);
  WITH_HALF(else if (kind == F16) f(static_cast<const half*>(data) + at);)
}

template <class A>
constexpr int32_t kind_of() { return sizeof(A) == 4 ? F32 : F64; }

struct Map {
  const void* data;
  int32_t kind;
};

// What a function is given: a row of 64-bit words that are taken one after the other, as native.py writes them. With a
// table the row has no addresses in it and serves for other tensors too: where an address is due there is a place in the
// table, or below zero -1 - (2 * bytes + n), so many bytes behind what stands in the table's place 1 + n (`behind`).
struct Words {
  const int64_t* at;
  const int64_t* table;

  int64_t integer() { return *at++; }
  bool flag() { return integer() != 0; }
  double number() {
    const int64_t bits = integer();
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
  }
  template <class T>
  T* address() {
    const int64_t given = integer();
    if (table == nullptr) return reinterpret_cast<T*>(given);
    if (given >= 0) return reinterpret_cast<T*>(table[given]);
    return reinterpret_cast<T*>(table[1 + ((-1 - given) & 1)] + ((-1 - given) >> 1));
  }
  // Braces are filled from the left, here and wherever a structure is read.
  Map map() { return Map{address<const void>(), int32_t(integer())}; }
  std::vector<Map> maps() {
    std::vector<Map> taken(integer());
    for (Map& one : taken) one = map();
    return taken;
  }
  template <class T>
  std::vector<T*> addresses(int64_t count) {
    std::vector<T*> taken(count);
    for (T*& one : taken) one = address<T>();
    return taken;
  }
};

// Room for numbers that are all written before they are read.
template <class T>
std::unique_ptr<T[]> room_for(int64_t count) { return std::unique_ptr<T[]>(new T[count]); }

struct Shape {
  int64_t images, channels, pixels;
  bool last;  // channels_last

  explicit Shape(Words& w) : images(w.integer()), channels(w.integer()), pixels(w.integer()), last(w.flag()) {}
  int64_t splits() const { return std::max<int64_t>(1, (pixels + CHUNK - 1) / CHUNK); }
  int64_t chunks() const { return images * splits(); }
  int64_t each() const { return (pixels + splits() - 1) / splits(); }
};

// Elements that hold any row.
int64_t room_of(const Shape& shape) { return std::max(shape.channels, CHUNK); }

int64_t chunk_pixels(const Shape& shape, int64_t split) {
  return std::min(shape.each(), shape.pixels - split * shape.each());
}

// Some pixels of an image in rows: of a pixel with all its channels (channels_last), or of a channel with all pixels.
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

// A coefficient (rows, C): where its number for the first column of a row of a chunk stands.
template <class A>
const A* coefficient(const A* data, int64_t rows, const Chunk& chunk, int64_t row) {
  if (rows > 1) data += chunk.image * chunk.shape.channels;
  return chunk.shape.last ? data : data + row;
}

// A row of a map in the accumulation type: where it stands, or converted into `scratch`.
template <class A>
const A* row_of(const Map& map, const Chunk& chunk, int64_t row, A* scratch) {
  const int64_t at = chunk.at(row), n = chunk.columns();
  if (map.kind == kind_of<A>()) return static_cast<const A*>(map.data) + at;
  typed(map.data, map.kind, at, [&](auto x) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scratch[j] = A(x[j]);
  });
  return scratch;
}

// Writes a row that was computed elsewhere, where the output is in another type.
template <class A>
void put(void* out, int32_t kind, const Chunk& chunk, int64_t row, const A* from) {
  if (kind == kind_of<A>()) return;
  typed(out, kind, chunk.at(row), [&](auto x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    T* y = const_cast<T*>(x);
    const int64_t n = chunk.columns();
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = T(from[j]);
  });
}


// Up to GROUP rows of a map in the accumulation type: the first one, and the distance from one to the next.
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
  for (int64_t r = 0; r < rows; ++r) row_of(map, chunk, row + r, scratch + r * n);
  return {scratch, n};
}

enum End { NONE, RELU, MASK };
enum More { NOTHING, MOMENTS, PRODUCTS };

// As many numbers as a register of this machine holds.
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

// 0 where x is below 0, or where the mask is not above it; NaN stays, as with torch.relu.
template <class T>
inline T positive(const T& x) { return x < T{} ? T{} : x; }
template <class T>
inline T masked(const T& x, const T& mask) { return mask <= T{} ? T{} : x; }

constexpr int64_t TERMS = 8;  // terms taken in one pass over registers

// Calls f with a number of terms, TERMS at the most, as a constant.
template <class F>
void with_constant(int64_t m, F f) {
  switch (m) {
    case 0: return f(std::integral_constant<int, 0>{});
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, TERMS>{});
  }
}

// R rows of channels_last maps, n apart, the numbers T from column j on: out = start + sum over M terms of a[m] * x[m],
// then ReLU or a mask. `start` is one row for all, or n apart too. With MOMENTS, sums are those of `add_moments`, which
// begin here if `fresh`. GROUP rows share what they read of coefficients, and M is a constant so that each term is read
// by an instruction of its own, by which the machine foresees what comes next.
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

// R rows of a sum of channels_last maps, in as many passes as its terms take.
template <class A, int R, End END, More MORE>
void sum_group(int64_t count, int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* out,
               A* sums, bool fresh) {
  int64_t stride = 0;
  for (; count > TERMS; count -= TERMS, x += TERMS, a += TERMS, start = out, stride = n)
    sum_rows<A, TERMS, R, End::NONE, NOTHING>(n, start, stride, x, a, mask, out, sums, fresh);
  with_constant(count, [&](auto m) {
    sum_rows<A, decltype(m)::value, R, END, MORE>(n, start, stride, x, a, mask, out, sums, fresh);
  });
}

// acc = start + sum over M terms of a[m] * x[m], then ReLU or a mask, for a row of contiguous maps: pixels of a
// channel, with one coefficient each. `start` is one number in the first pass over a row (FIRST), where later ones go on
// from acc.
template <class A, int M, bool FIRST, End END>
void pass(int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* acc) {
  std::array<const A*, M == 0 ? 1 : M> xs{};
  std::array<A, M == 0 ? 1 : M> as{};
  for (int m = 0; m < M; ++m) xs[m] = x[m], as[m] = *a[m];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    A v = start[FIRST ? 0 : j];
    for (int m = 0; m < M; ++m) v += as[m] * xs[m][j];
    if (END == RELU) v = positive(v);
    if (END == MASK) v = masked(v, mask[j]);
    acc[j] = v;
  }
}

template <class A, bool FIRST, End END>
void pass_of(int64_t m, int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* acc) {
  with_constant(m, [&](auto count) { pass<A, decltype(count)::value, FIRST, END>(n, start, x, a, mask, acc); });
}

// A row of a sum of contiguous maps with its coefficients, in as many passes as its terms take.
template <class A, End END>
void sum_row(int64_t count, int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* acc) {
  for (int64_t done = 0;; done += TERMS) {
    const int64_t m = std::min(TERMS, count - done);
    const bool ends = done + m == count;
    if (done == 0) {
      if (ends) return pass_of<A, true, END>(m, n, start, x, a, mask, acc);
      pass_of<A, true, End::NONE>(m, n, start, x, a, mask, acc);
    } else {
      if (ends) return pass_of<A, false, END>(m, n, acc, x + done, a + done, mask, acc);
      pass_of<A, false, End::NONE>(m, n, acc, x + done, a + done, mask, acc);
    }
  }
}

// sums[c] += sum over rows of x * y, of x alone where y is null; a fresh sum begins here.
template <class A>
void add_products(A* sums, bool fresh, const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& x,
                  const Rows<A>* y) {
  const int64_t n = chunk.columns();
  if (!chunk.shape.last) {
    for (int64_t r = 0; r < rows; ++r) {
      const A *from = x[r], *with = y == nullptr ? nullptr : (*y)[r];
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += with == nullptr ? from[j] : from[j] * with[j];
      sums[row + r] = sum;
    }
    return;
  }
  if (fresh) std::fill(sums, sums + n, A(0));
  if (rows < GROUP) {
    const A *from = x[0], *with = y == nullptr ? nullptr : (*y)[0];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += with == nullptr ? from[j] : from[j] * with[j];
    return;
  }
  const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  if (y == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += (x0[j] + x1[j]) + (x2[j] + x3[j]);
    return;
  }
  const A *y0 = (*y)[0], *y1 = (*y)[1], *y2 = (*y)[2], *y3 = (*y)[3];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sums[j] += (x0[j] * y0[j] + x1[j] * y1[j]) + (x2[j] * y2[j] + x3[j] * y3[j]);
}

// Adds some rows of a map to the sums of a chunk, (3, C), that its moments come from: a shift, and the sums of x - shift
// and of its square. The shift, the chunk's first pixel, keeps the variance of maps with a large mean from cancelling.
template <class A>
void add_moments(A* sums, const Chunk& chunk, int64_t row, int64_t rows, const Rows<A>& x) {
  const int64_t n = chunk.columns(), c = chunk.shape.channels;
  A *k = sums, *s = sums + c, *q = sums + 2 * c;
  if (!chunk.shape.last) {
    for (int64_t r = 0; r < rows; ++r) {
      const A *from = x[r], shift = from[0];
      A sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
      for (int64_t j = 0; j < n; ++j) {
        const A d = from[j] - shift;
        sum += d;
        square += d * d;
      }
      k[row + r] = shift, s[row + r] = sum, q[row + r] = square;
    }
    return;
  }
  const A* x0 = x[0];
  if (row == 0) {
    std::copy(x0, x0 + n, k);
    std::fill(s, s + 2 * c, A(0));
  }
  if (rows < GROUP) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A d = x0[j] - k[j];
      s[j] += d;
      q[j] += d * d;
    }
    return;
  }
  const A *x1 = x[1], *x2 = x[2], *x3 = x[3];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const A d0 = x0[j] - k[j], d1 = x1[j] - k[j], d2 = x2[j] - k[j], d3 = x3[j] - k[j];
    s[j] += (d0 + d1) + (d2 + d3);
    q[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
  }
}

// Runs f(row, rows) over the rows of a chunk: GROUP at a time, then one by one.
template <class F>
void by_groups(const Chunk& chunk, F f) {
  for (int64_t row = 0, rows; row < chunk.rows(); row += rows) {
    rows = chunk.rows() - row >= GROUP ? GROUP : 1;
    f(row, rows);
  }
}

// Mean and sum of squares about it of each channel of a chunk, as doubles (2, C), from the sums of `add_moments`.
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
  struct Term {
    Map map;
    const A* scale;  // (rows, C)
    int64_t rows;
  };
  const Shape& shape;
  const A* start;  // (start_rows, C)
  int64_t start_rows;
  std::vector<Term> terms{};
  std::vector<Map> others{};  // whose products with the sum are wanted
  Map mask{nullptr, kind_of<A>()};
  bool relu = false;

  // What a thread needs for it.
  struct Scratch {
    std::vector<const A*> x, a;
    std::vector<A> converted, out;  // GROUP rows of each map of another type
  };

  // Whether some map is not in the accumulation type, so that its rows are converted first.
  bool is_foreign() const {
    const auto foreign = [](const Map& map) { return map.kind != kind_of<A>(); };
    return (mask.data != nullptr && foreign(mask)) || std::any_of(others.begin(), others.end(), foreign) ||
           std::any_of(terms.begin(), terms.end(), [&](const Term& term) { return foreign(term.map); });
  }

  Scratch scratch(int32_t kind) const {
    Scratch made;
    made.x.resize(terms.size()), made.a.resize(terms.size());
    if (is_foreign()) made.converted.resize((terms.size() + 1) * GROUP * room_of(shape));
    if (kind != kind_of<A>()) made.out.resize(GROUP * room_of(shape));
    return made;
  }

  // One chunk: writes the rows to `out`, and to `sums` what MORE asks for: (3, C) for MOMENTS, (others + 1, C) for
  // PRODUCTS.
  template <More MORE>
  void run(const Chunk& chunk, void* out, int32_t kind, A* sums, Scratch& scratch) const {
    by_groups(chunk, [&](int64_t row, int64_t rows) { run_rows<MORE>(chunk, row, rows, out, kind, sums, scratch); });
  }

  // GROUP rows of a chunk, or one.
  template <More MORE>
  void run_rows(const Chunk& chunk, int64_t row, int64_t rows, void* out, int32_t kind, A* sums,
                Scratch& scratch) const {
    const bool stored = kind == kind_of<A>();
    const Rows<A> done =
        stored ? rows_of<A>(Map{out, kind}, chunk, row, rows, nullptr) : Rows<A>{scratch.out.data(), chunk.columns()};
    // the moments are those of what is stored, which may have been rounded
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
      scratch.a[i] = coefficient(terms[i].scale, terms[i].rows, chunk, row);
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
        scratch.x[i] = row_of(terms[i].map, chunk, row + r, slot);
        scratch.a[i] = coefficient(terms[i].scale, terms[i].rows, chunk, row + r);
      }
      const A* from = coefficient(start, start_rows, chunk, row + r);
      const A* masks = mask.data == nullptr ? nullptr : row_of(mask, chunk, row + r, slot);
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

constexpr int64_t BATCH = 0, NO_STATISTICS = -1, RAW = -2, RUNNING = -3;
constexpr int64_t BLOCK = 64;  // channels of which a thread does the arithmetic at a time

// A norm: which statistics it takes, and where they and the affine form N(x) = rate * x + shift go; see forms.py.
template <class A>
struct Form {
  int64_t groups = NO_STATISTICS;  // or BATCH, RAW, RUNNING
  double eps = 0;
  const A *weight = nullptr, *bias = nullptr;  // (C,) or null
  // with RAW the mean and the variance in place of rate and shift; with RUNNING pooled and variance are the running
  // statistics; else both may be null
  A *rate = nullptr, *shift = nullptr, *pooled = nullptr, *variance = nullptr;

  Form() = default;
  explicit Form(Words& w)
      : groups(w.integer()), eps(w.number()), weight(w.address<const A>()), bias(w.address<const A>()),
        rate(w.address<A>()), shift(w.address<A>()), pooled(w.address<A>()), variance(w.address<A>()) {}

  bool gathers() const { return groups != NO_STATISTICS && groups != RUNNING; }
};

// The gradient of a map through its norm, as offset + slope * x: none, given, or to be made of the rest.
template <class A>
struct Through {
  enum Kind { NOTHING, GIVEN, MADE };
  int64_t kind, rows = 1;
  const A *offset = nullptr, *slope = nullptr;  // (rows, C)
  int64_t groups = NO_STATISTICS;
  double eps = 0, count = 1;                                // of numbers that are normalised together
  const A *weight = nullptr;
  const A *pooled = nullptr, *variance = nullptr;           // with RAW the mean in place of pooled
  const A *grad_rate = nullptr, *grad_shift = nullptr;      // null for zero
  A *grad_weight = nullptr, *grad_bias = nullptr;           // (C,) or null
  std::unique_ptr<A[]> made{};

  Through(Words& w, int64_t channels) : kind(w.integer()) {
    if (kind == NOTHING) return;
    rows = w.integer();
    if (kind == GIVEN) {
      offset = w.address<const A>(), slope = w.address<const A>();
      return;
    }
    groups = w.integer(), eps = w.number(), count = double(w.integer());
    weight = w.address<const A>(), pooled = w.address<const A>(), variance = w.address<const A>();
    grad_rate = w.address<const A>(), grad_shift = w.address<const A>();
    grad_weight = w.address<A>(), grad_bias = w.address<A>();
    made = room_for<A>(2 * rows * channels);
    offset = made.get(), slope = made.get() + rows * channels;
  }
};

// The terms of a sum with coefficients, the residual branch first where it comes before its norm.
template <class A>
struct Pairs {
  std::vector<Map> maps;
  bool branch;
  int64_t rows;
  A *scales, *bias = nullptr;            // (maps, rows, C), (rows, C) or null
  int64_t total;                         // maps whose shifts count; 0 where scales and bias are given
  const A* weight = nullptr;             // (total, C)
  std::vector<const A*> rates, shifts;   // (rows, C) each
  const A *branch_rate = nullptr, *branch_shift = nullptr;  // (1, C)
  std::unique_ptr<A[]> made{};

  Pairs(Words& w, int64_t channels)
      : maps(w.maps()), branch(w.flag()), rows(w.integer()), scales(w.address<A>()), bias(w.address<A>()),
        total(w.integer()) {
    if (total == 0) return;
    weight = w.address<const A>();
    rates = w.addresses<const A>(total), shifts = w.addresses<const A>(total);
    branch_rate = w.address<const A>(), branch_shift = w.address<const A>();
    const int64_t each = rows * channels;
    made = room_for<A>((maps.size() + 1) * each);
    bias = made.get();
    if (scales == nullptr) scales = made.get() + each;
  }

  int64_t count() const { return maps.size(); }
  int64_t first() const { return total - (count() - branch); }  // the maps before it are summed elsewhere
};

// Where the gradients of pairs go.
template <class A>
struct PairGradients {
  A *scales, *bias;                          // (maps, rows, C), (rows, C)
  A *weight = nullptr;                       // (total, C)
  A *rates = nullptr, *shifts = nullptr;     // (maps without branch, rows, C), (total, rows, C)
  int64_t fresh = 0;                         // rates and shifts that are written; to those behind them it adds
  A *branch_rate = nullptr, *branch_shift = nullptr;  // (1, C)
  std::unique_ptr<A[]> made{};

  PairGradients(Words& w, const Pairs<A>& pairs, int64_t channels) : scales(w.address<A>()), bias(w.address<A>()) {
    if (pairs.total == 0) return;
    weight = w.address<A>(), rates = w.address<A>(), shifts = w.address<A>(), fresh = w.integer();
    branch_rate = w.address<A>(), branch_shift = w.address<A>();
    const int64_t each = pairs.rows * channels;
    made = room_for<A>((pairs.count() + 1) * each + 2 * channels);
    bias = made.get(), scales = bias + each;
    if (branch_rate == nullptr) branch_rate = scales + pairs.count() * each, branch_shift = branch_rate + channels;
  }
};

// The functions from here on that begin with `team_` are called by all threads of a parallel region and share the work.

// Moments of the channels from `from` on of `chunks` chunks together, by Chan's formula: mean and sum of squares.
double merge_moments(const Shape& shape, const double* parts, int64_t first, int64_t chunks, int64_t from, int64_t n,
                     double* mean, double* about) {
  const double* part = parts + first * 2 * shape.channels + from;
  std::copy(part, part + n, mean);
  std::copy(part + shape.channels, part + shape.channels + n, about);
  double count = double(chunk_pixels(shape, first % shape.splits()));
  for (int64_t k = first + 1; k < first + chunks; ++k) {
    part += 2 * shape.channels;
    const double more = double(chunk_pixels(shape, k % shape.splits())), total = count + more;
    const double share = more / total, between = count * share;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const double delta = part[j] - mean[j];
      mean[j] += delta * share;
      about[j] += part[shape.channels + j] + delta * delta * between;
    }
    count = total;
  }
  return count;
}

// The form of n channels from `channel` on with their mean and t = 1 / sqrt(var + eps), to place `at` and after.
template <class A, class Mean, class Rate>
void write_form(const Form<A>& form, int64_t at, int64_t channel, int64_t n, Mean mean, Rate t) {
  const A *weight = form.weight, *bias = form.bias;
  A *rate = form.rate + at, *shift = form.shift + at;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const double r = weight == nullptr ? t(j) : weight[channel + j] * t(j);
    rate[j] = A(r);
    shift[j] = A((bias == nullptr ? 0 : double(bias[channel + j])) - mean(j) * r);
  }
}

// The form of a batch norm by its running statistics.
template <class A>
void team_running(int64_t c, const Form<A>& form) {
  const A *mean = form.pooled, *var = form.variance;
#pragma omp for
  for (int64_t from = 0; from < c; from += BLOCK)
    write_form(form, from, from, std::min(BLOCK, c - from), [=](int64_t j) { return double(mean[from + j]); },
               [=, eps = form.eps](int64_t j) { return 1 / std::sqrt(var[from + j] + eps); });
}

// The moments of what an affine form makes of some channels, from theirs.
template <class A>
void move_moments(const Form<A>& inner, int64_t from, int64_t n, double* mean, double* about) {
  for (int64_t j = 0; j < n; ++j) {
    const double r = inner.rate[from + j];
    mean[j] = r * mean[j] + inner.shift[from + j];
    about[j] *= r * r;
  }
}

template <class F>
double sum_of(int64_t n, F f) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += f(j);
  return sum;
}

// The form of a norm from the moments of chunks, (chunks, 2, C); of the norm of inner(x) where that is given.
template <class A>
void team_form(const Shape& shape, const double* parts, const Form<A>& form, const Form<A>* inner = nullptr) {
  const int64_t c = shape.channels, splits = shape.splits();
  if (form.groups == BATCH || form.groups == RAW) {
    const int64_t blocks = (c + BLOCK - 1) / BLOCK, outer = form.groups == BATCH ? 1 : shape.images;
    const int64_t chunks = form.groups == BATCH ? shape.chunks() : splits;
#pragma omp for
    for (int64_t unit = 0; unit < outer * blocks; ++unit) {
      const int64_t row = unit / blocks, from = unit % blocks * BLOCK, n = std::min(BLOCK, c - from);
      double mean[BLOCK], about[BLOCK];
      const double count = merge_moments(shape, parts, row * splits, chunks, from, n, mean, about);
      if (inner != nullptr) move_moments(*inner, from, n, mean, about);
      const int64_t at = row * c + from;
      const double inverse = 1 / count;
      for (int64_t j = 0; j < n; ++j) about[j] *= inverse;
      if (form.groups == RAW) {
        for (int64_t j = 0; j < n; ++j) form.rate[at + j] = A(mean[j]), form.shift[at + j] = A(about[j]);
        continue;
      }
      if (form.pooled != nullptr)
        for (int64_t j = 0; j < n; ++j) form.pooled[at + j] = A(mean[j]), form.variance[at + j] = A(about[j]);
      write_form(form, at, from, n, [&](int64_t j) { return mean[j]; },
                 [&](int64_t j) { return 1 / std::sqrt(about[j] + form.eps); });
    }
    return;
  }
  const int64_t size = c / form.groups;
  std::vector<double> mean(size), about(size);
#pragma omp for
  for (int64_t set = 0; set < shape.images * form.groups; ++set) {
    const int64_t image = set / form.groups, from = set % form.groups * size;
    const double count = merge_moments(shape, parts, image * splits, splits, from, size, mean.data(), about.data());
    if (inner != nullptr) move_moments(*inner, from, size, mean.data(), about.data());
    const double m = sum_of(size, [&](int64_t j) { return mean[j]; }) / size, inverse = 1 / count;
    const double v = sum_of(size, [&](int64_t j) { return about[j] * inverse + (mean[j] - m) * (mean[j] - m); }) / size;
    if (form.pooled != nullptr) form.pooled[set] = A(m), form.variance[set] = A(v);
    const double t = 1 / std::sqrt(v + form.eps);
    write_form(form, image * c + from, from, size, [=](int64_t) { return m; }, [=](int64_t) { return t; });
  }
}

template <class A>
void team_through(int64_t c, const Through<A>& t) {
  A *offset = t.made.get(), *slope = offset + t.rows * c;
  if (t.groups == RAW) {  // d mean = dx / count and d var = 2 (x - mean) dx / count
#pragma omp for
    for (int64_t i = 0; i < t.rows * c; ++i) {
      const double tilt = t.grad_shift == nullptr ? 0 : 2 * double(t.grad_shift[i]) / t.count;
      slope[i] = A(tilt);
      offset[i] = A((t.grad_rate == nullptr ? 0 : double(t.grad_rate[i]) / t.count) - tilt * t.pooled[i]);
    }
    return;
  }
  // with r = 1 / sigma: rate = w r and shift = b - w M r, so dr = w (grad_rate - M grad_shift), dM = -w r grad_shift
  const int64_t size = t.groups == BATCH ? 1 : c / t.groups;
#pragma omp for
  for (int64_t set = 0; set < t.rows * c / size; ++set) {
    const double m = t.pooled[set], r = 1 / std::sqrt(t.variance[set] + t.eps);
    double through = 0, moved = 0;
    for (int64_t i = set * size; i < (set + 1) * size; ++i) {
      const double w = t.weight == nullptr ? 1 : t.weight[i % c];
      const double shift = t.grad_shift == nullptr ? 0 : t.grad_shift[i];
      const double own = (t.grad_rate == nullptr ? 0 : t.grad_rate[i]) - m * shift;
      through += w * own;
      moved += w * shift;
      if (t.grad_weight != nullptr) t.grad_weight[i] = A(own * r), t.grad_bias[i] = A(shift);
    }
    const double tilt = -through * r * r * r / t.count, start = -moved * r / t.count - tilt * m;
    std::fill(slope + set * size, slope + (set + 1) * size, A(tilt));
    std::fill(offset + set * size, offset + (set + 1) * size, A(start));
  }
}

// a_i = w_i * rate_i and b = sum_i w_i * shift_i, see forms.py.
template <class A>
void team_coefficients(int64_t c, const Pairs<A>& p) {
  const int64_t blocks = (c + BLOCK - 1) / BLOCK, first = p.first();
#pragma omp for
  for (int64_t unit = 0; unit < p.rows * blocks; ++unit) {
    const int64_t from = unit % blocks * BLOCK, n = std::min(BLOCK, c - from), at = unit / blocks * c + from;
    const auto scale = [&](int64_t i) { return p.scales + i * p.rows * c + at; };
    A* bias = p.bias + at;
    if (p.branch) std::copy(p.branch_rate + from, p.branch_rate + from + n, scale(0));
    for (int64_t j = 0; j < n; ++j) bias[j] = p.branch ? p.branch_shift[from + j] : A(0);
    for (int64_t i = 0; i < p.total; ++i) {
      const A *w = p.weight + i * c + from, *shift = p.shifts[i] + at, *rate = p.rates[i] + at;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) bias[j] += w[j] * shift[j];
      if (i < first) continue;
      A* to = scale(i - first + p.branch);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) to[j] = w[j] * rate[j];
    }
  }
}

// At most BLOCK products, which may be added to what is there. They are rounded before, as where they are kept and added
// up elsewhere, so that both ways give the same bits.
template <class A>
void put_products(int64_t n, const A* w, const A* x, bool adds, A* to) {
  A products[BLOCK];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) products[j] = w[j] * x[j];
  asm volatile("" : : "r"(products) : "memory");  // or the compiler would contract the two
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = adds ? to[j] + products[j] : products[j];
}

template <class A>
void team_coefficients_backward(int64_t c, const Pairs<A>& p, const PairGradients<A>& g) {
  const int64_t blocks = (c + BLOCK - 1) / BLOCK, first = p.first();
#pragma omp for
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = block * BLOCK, n = std::min(BLOCK, c - from);
    if (p.branch) {
      A *rate = g.branch_rate + from, *shift = g.branch_shift + from;
      std::fill(rate, rate + n, A(0));
      std::fill(shift, shift + n, A(0));
      for (int64_t row = 0; row < p.rows; ++row)
        for (int64_t j = 0; j < n; ++j) {
          rate[j] += g.scales[row * c + from + j];
          shift[j] += g.bias[row * c + from + j];
        }
    }
    for (int64_t i = 0; i < p.total; ++i) {
      const A* w = p.weight + i * c + from;
      A* to = g.weight + i * c + from;
      std::fill(to, to + n, A(0));
      for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t at = row * c + from;
        const A *shift = p.shifts[i] + at, *rate = p.rates[i] + at, *bias = g.bias + at;
        put_products(n, w, bias, i >= g.fresh, g.shifts + i * p.rows * c + at);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] += shift[j] * bias[j];
        if (i < first) continue;
        const A* scale = g.scales + (i - first + p.branch) * p.rows * c + at;
        put_products(n, w, scale, i >= g.fresh, g.rates + (i - first) * p.rows * c + at);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] += rate[j] * scale[j];
      }
    }
  }
}

// (terms, rows, C) from sums of chunks, (chunks, terms, C): the last term goes to `last`, the others to `out`.
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

// Moments of the chunks of a map, (chunks, 2, C).
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

// Runs a sum over all chunks; each thread has the same ones in every pass.
template <More MORE, class A>
void team_sum(const Sum<A>& sum, void* out, int32_t kind, double* moments, A* products) {
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

// The functions from here on read what they are given and share it out; see native.py.

// The form of a norm of a map; with `inner`, a batch norm by its running statistics, that of norm(inner(x)).
template <class A>
void enter(Words w, int threads) {
  const Shape shape(w);
  const Map x = w.map();
  const Form<A> form(w);
  const bool nested = w.flag();
  const Form<A> inner = nested ? Form<A>(w) : Form<A>();
  const int64_t c = shape.channels, rows = form.groups == RUNNING || form.groups == BATCH ? 1 : shape.images;
  const auto parts = room_for<double>(form.gathers() ? shape.chunks() * 2 * c : 0);
#pragma omp parallel num_threads(threads)
  {
    if (nested) team_running(c, inner);
    if (form.groups == RUNNING) {
      team_running(c, form);
    } else {
      team_moments<A>(shape, x, parts.get());
      team_form(shape, parts.get(), form, nested ? &inner : nullptr);
    }
    if (nested) {
#pragma omp for
      for (int64_t i = 0; i < rows * c; ++i) {
        form.shift[i] += form.rate[i] * inner.shift[i % c];
        form.rate[i] *= inner.rate[i % c];
      }
    }
  }
}

// s(addends + norm of the branch + sum of pairs), with the form of the norm of the result. The branch's own norm goes
// by its moments or running statistics, unless pairs have its form.
template <class A>
void block(Words w, int threads) {
  const Shape shape(w);
  const int64_t c = shape.channels;
  const std::vector<Map> addends = w.maps();
  const bool normed = w.flag();
  const Form<A> norm = normed ? Form<A>(w) : Form<A>();
  const Pairs<A> pairs(w, c);
  const bool relu = w.flag();
  const Map y = w.map();
  const Form<A> own(w);

  const std::vector<A> zeros(pairs.bias == nullptr ? c : 0), ones(c, A(1));
  Sum<A> sum{shape, pairs.bias == nullptr ? zeros.data() : pairs.bias, pairs.bias == nullptr ? 1 : pairs.rows};
  sum.relu = relu;
  for (const Map& addend : addends) sum.terms.push_back({addend, ones.data(), 1});
  for (int64_t i = 0; i < pairs.count(); ++i)
    sum.terms.push_back({pairs.maps[i], pairs.scales + i * pairs.rows * c, pairs.rows});
  const auto parts = room_for<double>(own.gathers() || norm.gathers() ? shape.chunks() * 2 * c : 0);
  void* out = const_cast<void*>(y.data);
#pragma omp parallel num_threads(threads)
  {
    if (own.groups == RUNNING) team_running(c, own);
    if (norm.groups == RUNNING) {
      team_running(c, norm);
    } else if (norm.gathers()) {
      team_moments<A>(shape, pairs.maps[0], parts.get());
      team_form(shape, parts.get(), norm);
    }
    if (pairs.total) team_coefficients(c, pairs);
    if (own.gathers()) {
      team_sum<MOMENTS>(sum, out, y.kind, parts.get(), static_cast<A*>(nullptr));
      team_form(shape, parts.get(), own);
    } else {
      team_sum<NOTHING>(sum, out, y.kind, nullptr, static_cast<A*>(nullptr));
    }
  }
}

// The gradient of a map from all that used it.
template <class A>
struct Pull {
  Map x, grad;     // no data for no gradient
  Through<A> own;
  std::vector<typename Sum<A>::Term> later;
  bool relu;
  void* out;       // of the kind of x
  std::vector<A> zeros, ones;

  Pull(Words& w, const Shape& shape)
      : x(w.map()), grad(w.map()), own(w, shape.channels), later(w.integer()), zeros(shape.channels),
        ones(shape.channels, A(1)) {
    for (auto& term : later) term = {w.map(), w.address<const A>(), w.integer()};
    relu = w.flag();
    out = w.address<void>();
  }

  Sum<A> sum(const Shape& shape) const {
    const bool offset = own.kind != Through<A>::NOTHING;
    Sum<A> made{shape, offset ? own.offset : zeros.data(), offset ? own.rows : 1};
    if (grad.data != nullptr) made.terms.push_back({grad, ones.data(), 1});
    if (offset) made.terms.push_back({x, own.slope, own.rows});
    made.terms.insert(made.terms.end(), later.begin(), later.end());
    if (relu) made.mask = x;
    return made;
  }
};

template <class A>
void pull(Words w, int threads) {
  const Shape shape(w);
  const int64_t c = shape.channels;
  const Pull<A> p(w, shape);
  Sum<A> sum = p.sum(shape);
  sum.others = w.maps();
  const int64_t rows = w.integer(), terms = sum.others.size() + 1;
  A *grad_scales = w.address<A>(), *grad_bias = w.address<A>();
  const auto parts = room_for<A>(rows ? shape.chunks() * terms * c : 0);
#pragma omp parallel num_threads(threads)
  {
    if (p.own.kind == Through<A>::MADE) team_through(c, p.own);
    if (rows) {
      team_sum<PRODUCTS>(sum, p.out, p.x.kind, nullptr, parts.get());
      team_merge(shape, parts.get(), terms, rows, grad_scales, grad_bias);
    } else {
      team_sum<NOTHING>(sum, p.out, p.x.kind, nullptr, static_cast<A*>(nullptr));
    }
  }
}

// `pull` of what `block` made, on to the gradients of all that it took.
template <class A>
void pull_block(Words w, int threads) {
  const Shape shape(w);
  const int64_t c = shape.channels;
  const Pull<A> p(w, shape);
  const Pairs<A> pairs(w, c);
  const PairGradients<A> to(w, pairs, c);
  Through<A> branch(w, c);  // through the norm of the branch, where that is not given
  const bool normed = branch.kind == Through<A>::MADE;
  if (normed) branch.grad_rate = to.branch_rate, branch.grad_shift = to.branch_shift;
  void* branch_out = w.address<void>();

  Sum<A> sum = p.sum(shape);
  sum.others = pairs.maps;
  const int64_t terms = pairs.count() + 1;
  const auto parts = room_for<A>(shape.chunks() * terms * c);
  Sum<A> back{shape, normed ? branch.offset : p.zeros.data(), 1};
  if (normed) back.terms.push_back({pairs.maps[0], branch.slope, 1});
  if (pairs.branch) back.terms.push_back({Map{p.out, p.x.kind}, pairs.scales, pairs.rows});
#pragma omp parallel num_threads(threads)
  {
    if (p.own.kind == Through<A>::MADE) team_through(c, p.own);
    if (pairs.total) team_coefficients(c, pairs);
    team_sum<PRODUCTS>(sum, p.out, p.x.kind, nullptr, parts.get());
    team_merge(shape, parts.get(), terms, pairs.rows, to.scales, to.bias);
    if (pairs.total) team_coefficients_backward(c, pairs, to);
    if (normed) team_through(c, branch);
    if (pairs.branch) team_sum<NOTHING>(back, branch_out, pairs.maps[0].kind, nullptr, static_cast<A*>(nullptr));
  }
}

template <class A>
void mix(Words w, int threads) {
  const Shape shape(w);
  const int64_t c = shape.channels;
  const std::vector<Map> maps = w.maps(), out = w.maps();
  const int64_t count = maps.size(), outputs = out.size();
  const A* scales = w.address<const A>();  // (outputs, maps, rows, C)
  const int64_t rows = w.integer();
  const std::vector<A> zeros(c);
  std::vector<Sum<A>> sums(outputs, Sum<A>{shape, zeros.data(), 1});
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < count; ++i) sums[o].terms.push_back({maps[i], scales + (o * count + i) * rows * c, rows});
#pragma omp parallel num_threads(threads)
  {
    typename Sum<A>::Scratch scratch = sums[0].scratch(out[0].kind);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      by_groups(chunk, [&](int64_t row, int64_t group) {  // rows of each map stay in cache for all outputs
        for (int64_t o = 0; o < outputs; ++o)
          sums[o].template run_rows<NOTHING>(chunk, row, group, const_cast<void*>(out[o].data), out[o].kind, nullptr,
                                             scratch);
      });
    }
  }
}

// Two norms one after the other, N(b(x)): see forms.nested_form. Numbers per channel of n images, (N, C), and what the
// forward pass gives: rate and shift of both, (rows, C), mean and variance of b, (C,), and of N, one a set.
template <class A>
struct Nested {
  int64_t images, channels, groups;  // of N, or BATCH
  double eps, outer_eps;
  const A *mean, *var;      // (N, C)
  const A *weight, *bias;   // (C,) or null
  A *rate, *shift, *pooled, *variance, *outer_mean, *outer_var;

  explicit Nested(Words& w)
      : images(w.integer()), channels(w.integer()), groups(w.integer()), eps(w.number()), outer_eps(w.number()),
        mean(w.address<const A>()), var(w.address<const A>()), weight(w.address<const A>()),
        bias(w.address<const A>()), rate(w.address<A>()), shift(w.address<A>()), pooled(w.address<A>()),
        variance(w.address<A>()), outer_mean(w.address<A>()), outer_var(w.address<A>()) {}

  int64_t sets() const { return groups == BATCH ? channels : images * groups; }
  int64_t count() const { return groups == BATCH ? images : channels / groups; }
  int64_t rows() const { return groups == BATCH ? 1 : images; }
  double r(int64_t j) const { return (weight == nullptr ? 1 : double(weight[j])) / std::sqrt(variance[j] + eps); }
  double s(int64_t j) const { return (bias == nullptr ? 0 : double(bias[j])) - pooled[j] * r(j); }

  // Calls f(i, j) for the places i in (N, C), of channel j, that N normalises together.
  template <class F>
  void over_set(int64_t set, F f) const {
    if (groups == BATCH) {
      for (int64_t i = 0; i < images; ++i) f(i * channels + set, set);
      return;
    }
    for (int64_t k = 0, from = set % groups * count(); k < count(); ++k)
      f(set / groups * channels + from + k, from + k);
  }
};

template <class A>
void nested(Words w, int) {
  const Nested<A> p(w);
  const int64_t n = p.images, c = p.channels;
  for (int64_t j = 0; j < c; ++j) {
    double mean = 0, var = 0;
    for (int64_t i = 0; i < n; ++i) mean += p.mean[i * c + j];
    mean /= n;
    for (int64_t i = 0; i < n; ++i) var += p.var[i * c + j] + (p.mean[i * c + j] - mean) * (p.mean[i * c + j] - mean);
    p.pooled[j] = A(mean), p.variance[j] = A(var / n);
  }
  std::vector<double> r(c), s(c);
  for (int64_t j = 0; j < c; ++j) r[j] = p.r(j), s[j] = p.s(j);
  for (int64_t set = 0; set < p.sets(); ++set) {
    double mean = 0, var = 0;
    p.over_set(set, [&](int64_t i, int64_t j) { mean += r[j] * p.mean[i] + s[j]; });
    mean /= p.count();
    p.over_set(set, [&](int64_t i, int64_t j) {
      const double away = r[j] * p.mean[i] + s[j] - mean;
      var += r[j] * r[j] * p.var[i] + away * away;
    });
    var /= p.count();
    p.outer_mean[set] = A(mean), p.outer_var[set] = A(var);
    const double t = 1 / std::sqrt(var + p.outer_eps);
    p.over_set(set, [&](int64_t i, int64_t j) {
      const int64_t at = p.rows() == 1 ? j : i;
      p.rate[at] = A(t * r[j]), p.shift[at] = A(t * (s[j] - mean));
    });
  }
}

template <class A>
void nested_backward(Words w, int) {
  const Nested<A> p(w);
  const A *grad_rate = w.address<const A>(), *grad_shift = w.address<const A>();
  A *to_mean = w.address<A>(), *to_var = w.address<A>(), *to_weight = w.address<A>(), *to_bias = w.address<A>();
  const int64_t n = p.images, c = p.channels;
  std::vector<double> r(c), s(c), to_r(c), to_s(c);
  for (int64_t j = 0; j < c; ++j) r[j] = p.r(j), s[j] = p.s(j);
  for (int64_t set = 0; set < p.sets(); ++set) {
    const double mean = p.outer_mean[set], t = 1 / std::sqrt(p.outer_var[set] + p.outer_eps);
    double moved = 0, through = 0;
    const auto result = [&](int64_t at, int64_t j) {
      moved += grad_shift[at] * t;
      through += grad_rate[at] * r[j] + grad_shift[at] * (s[j] - mean);
      to_r[j] += grad_rate[at] * t;
      to_s[j] += grad_shift[at] * t;
    };
    if (p.groups == BATCH) result(set, set);
    else p.over_set(set, result);
    const double a = -moved / p.count(), v = -0.5 * t * t * t * through / p.count();
    p.over_set(set, [&](int64_t i, int64_t j) {
      const double to = a + 2 * (r[j] * p.mean[i] + s[j] - mean) * v;
      to_r[j] += to * p.mean[i] + 2 * r[j] * p.var[i] * v;
      to_s[j] += to;
      to_mean[i] = A(to * r[j]), to_var[i] = A(r[j] * r[j] * v);
    });
  }
  for (int64_t j = 0; j < c; ++j) {
    const double m = p.pooled[j], t = 1 / std::sqrt(p.variance[j] + p.eps), own = to_r[j] - m * to_s[j];
    const double a = -r[j] * to_s[j] / n, v = -0.5 * t * t * r[j] * own / n;
    to_weight[j] = A(own * t), to_bias[j] = A(to_s[j]);
    for (int64_t i = j; i < n * c; i += c) to_mean[i] += A(a + 2 * (p.mean[i] - m) * v), to_var[i] += A(v);
  }
}

// The form of a batch norm by its running statistics.
template <class A>
void running(Words w, int) {
  const int64_t c = w.integer();
  team_running(c, Form<A>(w));
}

// One step of running statistics towards those of a batch.
template <class A>
void move(Words w, int) {
  const int64_t c = w.integer();
  const A *mean = w.address<const A>(), *var = w.address<const A>();
  const double unbiased = w.number(), step = w.number();
  A *running_mean = w.address<A>(), *running_var = w.address<A>();
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    running_mean[j] += A(step) * (mean[j] - running_mean[j]);
    running_var[j] += A(step) * (var[j] * A(unbiased) - running_var[j]);
  }
}

template <class A>
void dots(Words w, int threads) {
  const Shape shape(w);
  const std::vector<Map> grads = w.maps(), maps = w.maps();
  const int64_t rows = w.integer(), c = shape.channels, grad_count = grads.size(), count = maps.size();
  const int64_t terms = grad_count * count, room = GROUP * room_of(shape);
  A* out = w.address<A>();  // (grads, maps, rows, C)
  const auto parts = room_for<A>(shape.chunks() * terms * c);
#pragma omp parallel num_threads(threads)
  {
    std::vector<A> buffer((grad_count + 1) * room);
    std::vector<Rows<A>> taken(grad_count);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      A* sums = parts.get() + index * terms * c;
      by_groups(chunk, [&](int64_t row, int64_t group) {
        for (int64_t g = 0; g < grad_count; ++g)
          taken[g] = rows_of(grads[g], chunk, row, group, buffer.data() + g * room);
        for (int64_t i = 0; i < count; ++i) {
          const Rows<A> x = rows_of(maps[i], chunk, row, group, buffer.data() + grad_count * room);
          for (int64_t g = 0; g < grad_count; ++g)
            add_products(sums + (g * count + i) * c, row == 0, chunk, row, group, taken[g], &x);
        }
      });
    }
    team_merge(shape, parts.get(), terms, rows, out, static_cast<A*>(nullptr));
  }
}

}  // namespace

extern "C" {

int dense_shortcuts_has_half() {
#ifdef __FLT16_MAX__
  return 1;
#else
  return 0;
#endif
}

#define EXPORT(NAME)                                                                                       \
  void NAME##_f32(const int64_t* words, const int64_t* table) {                                            \
    NAME<float>(Words{words + 1, table}, int(words[0]));                                                   \
  }                                                                                                        \
  void NAME##_f64(const int64_t* words, const int64_t* table) {                                            \
    NAME<double>(Words{words + 1, table}, int(words[0]));                                                  \
  }

EXPORT(enter)
EXPORT(block)
EXPORT(pull)
EXPORT(pull_block)
EXPORT(mix)
EXPORT(dots)
EXPORT(running)
EXPORT(nested)
EXPORT(nested_backward)
EXPORT(move)
}
