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

struct Shape {
  int64_t images, channels, pixels;
  bool last;  // channels_last

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

// Where to compute a row of an output: in place, or in `scratch`, from which `put` writes it.
template <class A>
A* place(void* out, int32_t kind, const Chunk& chunk, int64_t row, A* scratch) {
  return kind == kind_of<A>() ? static_cast<A*>(out) + chunk.at(row) : scratch;
}

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

constexpr int64_t TERMS = 8;  // terms taken in one pass over registers

// acc = start + sum over M terms of a[m] * x[m], then ReLU or a mask. Coefficients vary along a row with channels_last
// and are one number else; so is `start` in the first pass over a row (FIRST), where later ones go on from acc. One row
// at a time: the machine foresees what a stream needs next, but not what jumps from row to row do.
template <class A, int M, bool LAST, bool FIRST, End END>
void pass(int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* acc) {
  std::array<const A*, M == 0 ? 1 : M> xs{}, as{};
  for (int m = 0; m < M; ++m) xs[m] = x[m], as[m] = a[m];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    A v = start[LAST || !FIRST ? j : 0];
    for (int m = 0; m < M; ++m) v += as[m][LAST ? j : 0] * xs[m][j];
    if (END == RELU) v = v < A(0) ? A(0) : v;  // keeps NaN, as torch.relu does
    if (END == MASK) v = mask[j] <= A(0) ? A(0) : v;
    acc[j] = v;
  }
}

template <class A, bool LAST, bool FIRST, End END>
void pass_of(int64_t m, int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask, A* acc) {
  switch (m) {
    case 0: return pass<A, 0, LAST, FIRST, END>(n, start, x, a, mask, acc);
    case 1: return pass<A, 1, LAST, FIRST, END>(n, start, x, a, mask, acc);
    case 2: return pass<A, 2, LAST, FIRST, END>(n, start, x, a, mask, acc);
    case 3: return pass<A, 3, LAST, FIRST, END>(n, start, x, a, mask, acc);
    case 4: return pass<A, 4, LAST, FIRST, END>(n, start, x, a, mask, acc);
    case 5: return pass<A, 5, LAST, FIRST, END>(n, start, x, a, mask, acc);
    case 6: return pass<A, 6, LAST, FIRST, END>(n, start, x, a, mask, acc);
    case 7: return pass<A, 7, LAST, FIRST, END>(n, start, x, a, mask, acc);
    default: return pass<A, TERMS, LAST, FIRST, END>(n, start, x, a, mask, acc);
  }
}

// A row of a sum with its coefficients, in as many passes as its terms take.
template <class A, End END>
void sum_row(bool last, int64_t count, int64_t n, const A* start, const A* const* x, const A* const* a, const A* mask,
             A* acc) {
  for (int64_t done = 0;; done += TERMS) {
    const int64_t m = std::min(TERMS, count - done);
    const A* from = done == 0 ? start : acc;
    const bool ends = done + m == count;
    if (last) {
      if (ends) return pass_of<A, true, false, END>(m, n, from, x + done, a + done, mask, acc);
      pass_of<A, true, false, End::NONE>(m, n, from, x + done, a + done, mask, acc);
    } else if (done == 0) {
      if (ends) return pass_of<A, false, true, END>(m, n, from, x, a, mask, acc);
      pass_of<A, false, true, End::NONE>(m, n, from, x, a, mask, acc);
    } else {
      if (ends) return pass_of<A, false, false, END>(m, n, from, x + done, a + done, mask, acc);
      pass_of<A, false, false, End::NONE>(m, n, from, x + done, a + done, mask, acc);
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
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    const double s = sum[j], rest = square[j] - s * s / pixels;
    to[j] = shift[j] + s / pixels;
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
    std::vector<A> converted, out;  // rows of maps of another type: one of each term and GROUP of the others
  };

  Scratch scratch(int32_t kind) const {
    Scratch made;
    made.x.resize(terms.size()), made.a.resize(terms.size());
    bool foreign = mask.data != nullptr && mask.kind != kind_of<A>();
    for (const Term& term : terms) foreign |= term.map.kind != kind_of<A>();
    for (const Map& map : others) foreign |= map.kind != kind_of<A>();
    if (foreign) made.converted.resize((terms.size() + 1 + GROUP) * room_of(shape));
    if (kind != kind_of<A>()) made.out.resize(GROUP * room_of(shape));
    return made;
  }

  // One chunk: writes the rows to `out`, and to `sums` what MORE asks for: (3, C) for MOMENTS, (others + 1, C) for
  // PRODUCTS.
  template <More MORE>
  void run(const Chunk& chunk, void* out, int32_t kind, A* sums, Scratch& scratch) const {
    by_groups(chunk, [&](int64_t row, int64_t rows) { run_rows<MORE>(chunk, row, rows, out, kind, sums, scratch); });
  }

  template <More MORE>
  void run_rows(const Chunk& chunk, int64_t row, int64_t rows, void* out, int32_t kind, A* sums,
                Scratch& scratch) const {
    const int64_t n = chunk.columns(), room = room_of(shape);
    const bool stored = kind == kind_of<A>();
    const Rows<A> done = stored ? rows_of<A>(Map{out, kind}, chunk, row, rows, nullptr) : Rows<A>{scratch.out.data(), n};
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
      if (masks != nullptr) sum_row<A, MASK>(shape.last, terms.size(), n, from, x, a, masks, acc);
      else if (relu) sum_row<A, RELU>(shape.last, terms.size(), n, from, x, a, nullptr, acc);
      else sum_row<A, End::NONE>(shape.last, terms.size(), n, from, x, a, nullptr, acc);
      put(out, kind, chunk, row + r, acc);
    }
    // the moments are those of what is stored, which may have been rounded
    if (MORE == MOMENTS)
      add_moments(sums, chunk, row, rows, rows_of(Map{out, kind}, chunk, row, rows, scratch.out.data()));
    if (MORE != PRODUCTS) return;
    A* slot = scratch.converted.data() + (scratch.converted.empty() ? 0 : (terms.size() + 1) * room);
    for (size_t i = 0; i < others.size(); ++i) {
      const Rows<A> other = rows_of(others[i], chunk, row, rows, slot);
      add_products(sums + i * shape.channels, row == 0, chunk, row, rows, done, &other);
    }
    add_products<A>(sums + others.size() * shape.channels, row == 0, chunk, row, rows, done, nullptr);
  }
};

// A norm: which statistics it takes, and where they and the affine form N(x) = rate * x + shift go; see forms.py.
template <class A>
struct Form {
  int64_t groups;  // or BATCH, RAW, RUNNING, NO_STATISTICS
  double eps;
  const A *weight, *bias;               // (C,) or null
  A *rate, *shift, *pooled, *variance;  // with RAW the mean and the variance in place of rate and shift; with RUNNING
                                        // pooled and variance are the running statistics; else both may be null
};

// The gradient of a map through its norm, as offset + slope * x.
template <class A>
struct Through {
  int64_t groups;
  double eps;
  const A* weight;
  const A *pooled, *variance;        // with RAW the mean in place of pooled
  const A *grad_rate, *grad_shift;   // null for zero
  double count;                      // of numbers that are normalised together
  int64_t rows;
  A *offset, *slope;                 // (rows, C)
  A *grad_weight, *grad_bias;        // (C,) or null
};

// The terms of a sum with coefficients, the residual branch first where it comes before its norm.
template <class A>
struct Pairs {
  const Map* maps;
  int64_t count;
  bool branch;
  const A* weight;  // (total, C)
  int64_t total;
  const A* const* rates;   // of each of `total` maps, (rows, C); null where the scales are given
  const A* const* shifts;
  const A *branch_rate, *branch_shift;  // (1, C)
  int64_t rows;
  A* scales;  // (count, rows, C)
  A* bias;    // (rows, C) or null

  int64_t first() const { return total - (count - branch); }  // the maps before it are summed elsewhere
};

template <class A>
struct PairGradients {
  A *scales, *bias;                          // (count, rows, C), (rows, C)
  A *weight;                                 // (total, C)
  A *rates, *shifts;                         // (count without branch, rows, C), (total, rows, C)
  A *branch_rate, *branch_shift;             // (1, C)
};

constexpr int64_t BATCH = 0, NO_STATISTICS = -1, RAW = -2, RUNNING = -3;
constexpr int64_t BLOCK = 64;  // channels of which a thread does the arithmetic at a time

// The functions from here on that begin with `team_` are called by all threads of a parallel region and share the work.

// Moments of the channels from `from` on of `chunks` chunks together, by Chan's formula: mean and sum of squares.
double merge_moments(const Shape& shape, const double* parts, int64_t first, int64_t chunks, int64_t from, int64_t n,
                     double* mean, double* about) {
  std::fill(mean, mean + n, 0.0);
  std::fill(about, about + n, 0.0);
  double count = 0;
  for (int64_t k = first; k < first + chunks; ++k) {
    const double* part = parts + k * 2 * shape.channels + from;
    const double more = double(chunk_pixels(shape, k % shape.splits())), total = count + more;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const double delta = part[j] - mean[j];
      mean[j] += delta * (more / total);
      about[j] += part[shape.channels + j] + delta * delta * (count * more / total);
    }
    count = total;
  }
  return count;
}

template <class A>
void write_form(const Form<A>& form, int64_t at, int64_t channel, double mean, double var) {
  const double t = 1 / std::sqrt(var + form.eps), r = form.weight == nullptr ? t : form.weight[channel] * t;
  form.rate[at] = A(r);
  form.shift[at] = A((form.bias == nullptr ? 0 : double(form.bias[channel])) - mean * r);
}

// The form of a batch norm by its running statistics.
template <class A>
void team_running(int64_t c, const Form<A>& form) {
#pragma omp for
  for (int64_t j = 0; j < c; ++j) write_form(form, j, j, form.pooled[j], form.variance[j]);
}

template <class A>
void keep(const Form<A>& form, int64_t at, double mean, double var) {
  if (form.pooled != nullptr) form.pooled[at] = A(mean), form.variance[at] = A(var);
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
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = row * c + from + j;
        const double var = about[j] / count;
        if (form.groups == RAW) {
          form.rate[at] = A(mean[j]), form.shift[at] = A(var);
          continue;
        }
        keep(form, at, mean[j], var);
        write_form(form, at, from + j, mean[j], var);
      }
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
    double m = 0, v = 0;
    for (int64_t j = 0; j < size; ++j) m += mean[j];
    m /= size;
    for (int64_t j = 0; j < size; ++j) v += about[j] / count + (mean[j] - m) * (mean[j] - m);
    v /= size;
    keep(form, set, m, v);
    for (int64_t j = 0; j < size; ++j) write_form(form, image * c + from + j, from + j, m, v);
  }
}

template <class A>
void team_through(int64_t c, const Through<A>& t) {
  if (t.groups == RAW) {  // d mean = dx / count and d var = 2 (x - mean) dx / count
#pragma omp for
    for (int64_t i = 0; i < t.rows * c; ++i) {
      const double tilt = t.grad_shift == nullptr ? 0 : 2 * double(t.grad_shift[i]) / t.count;
      t.slope[i] = A(tilt);
      t.offset[i] = A((t.grad_rate == nullptr ? 0 : double(t.grad_rate[i]) / t.count) - tilt * t.pooled[i]);
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
    std::fill(t.slope + set * size, t.slope + (set + 1) * size, A(tilt));
    std::fill(t.offset + set * size, t.offset + (set + 1) * size, A(start));
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
        A* to_shift = g.shifts + i * p.rows * c + at;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          to[j] += shift[j] * bias[j];
          to_shift[j] = w[j] * bias[j];
        }
        if (i < first) continue;
        const A* scale = g.scales + (i - first + p.branch) * p.rows * c + at;
        A* to_rate = g.rates + (i - first) * p.rows * c + at;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          to[j] += rate[j] * scale[j];
          to_rate[j] = w[j] * scale[j];
        }
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

// The form of a norm of a map; with `inner`, a batch norm by its running statistics, that of norm(inner(x)).
template <class A>
void enter(const Shape& shape, const Map& x, const Form<A>& form, const Form<A>* inner, int threads) {
  const int64_t c = shape.channels, rows = form.groups == RUNNING || form.groups == BATCH ? 1 : shape.images;
  std::vector<double> parts(form.groups == RUNNING ? 0 : shape.chunks() * 2 * c);
#pragma omp parallel num_threads(threads)
  {
    if (inner != nullptr) team_running(c, *inner);
    if (form.groups == RUNNING) {
      team_running(c, form);
    } else {
      team_moments<A>(shape, x, parts.data());
      team_form(shape, parts.data(), form, inner);
    }
    if (inner != nullptr) {
#pragma omp for
      for (int64_t i = 0; i < rows * c; ++i) {
        form.shift[i] += form.rate[i] * inner->shift[i % c];
        form.rate[i] *= inner->rate[i % c];
      }
    }
  }
}

// s(addends + norm of the branch + sum of pairs); `norm` is that of the branch unless its form is given. Scales and
// bias that are to be made stay here.
template <class A>
void block(const Shape& shape, const Map* addends, int64_t addend_count, const Form<A>* norm, Pairs<A> pairs, bool relu,
           void* y, int32_t kind, const Form<A>& own, int threads) {
  const int64_t c = shape.channels, made = pairs.rates == nullptr ? 0 : pairs.rows * c;
  std::vector<A> scales(pairs.count * made), bias(made);
  if (made) pairs.scales = scales.data(), pairs.bias = bias.data();
  const std::vector<A> zeros(pairs.bias == nullptr ? c : 0), ones(c, A(1));
  Sum<A> sum{shape, pairs.bias == nullptr ? zeros.data() : pairs.bias, pairs.bias == nullptr ? 1 : pairs.rows};
  sum.relu = relu;
  for (int64_t i = 0; i < addend_count; ++i) sum.terms.push_back({addends[i], ones.data(), 1});
  for (int64_t i = 0; i < pairs.count; ++i)
    sum.terms.push_back({pairs.maps[i], pairs.scales + i * pairs.rows * c, pairs.rows});
  const bool gathers = own.groups != NO_STATISTICS && own.groups != RUNNING;
  std::vector<double> parts(gathers || norm != nullptr ? shape.chunks() * 2 * c : 0);
#pragma omp parallel num_threads(threads)
  {
    if (own.groups == RUNNING) team_running(c, own);
    if (norm != nullptr && norm->groups == RUNNING) {
      team_running(c, *norm);
    } else if (norm != nullptr) {
      team_moments<A>(shape, pairs.maps[0], parts.data());
      team_form(shape, parts.data(), *norm);
    }
    if (pairs.rates != nullptr) team_coefficients(c, pairs);
    if (gathers) {
      team_sum<MOMENTS>(sum, y, kind, parts.data(), static_cast<A*>(nullptr));
      team_form(shape, parts.data(), own);
    } else {
      team_sum<NOTHING>(sum, y, kind, nullptr, static_cast<A*>(nullptr));
    }
  }
}

// The gradient of a map from all that used it.
template <class A>
struct Pull {
  Map x;
  const Map* grad;  // or null
  Through<A> own;   // offset is null where no gradient comes through statistics; pooled is null where it is given
  const Map* later;
  const A* const* later_scales;
  const int64_t* later_rows;
  int64_t later_count;
  bool relu;
  void* out;
  int32_t kind;
};

template <class A>
Sum<A> sum_of(const Shape& shape, const Pull<A>& p, const A* zeros, const A* ones) {
  Sum<A> sum{shape, p.own.offset == nullptr ? zeros : p.own.offset, p.own.offset == nullptr ? 1 : p.own.rows};
  if (p.grad != nullptr) sum.terms.push_back({*p.grad, ones, 1});
  if (p.own.offset != nullptr) sum.terms.push_back({p.x, p.own.slope, p.own.rows});
  for (int64_t l = 0; l < p.later_count; ++l) sum.terms.push_back({p.later[l], p.later_scales[l], p.later_rows[l]});
  if (p.relu) sum.mask = p.x;
  return sum;
}

template <class A>
void pull(const Shape& shape, const Pull<A>& p, const Map* maps, int64_t count, int64_t rows, A* grad_scales,
          A* grad_bias, int threads) {
  const int64_t c = shape.channels;
  const std::vector<A> zeros(c), ones(c, A(1));
  Sum<A> sum = sum_of(shape, p, zeros.data(), ones.data());
  sum.others.assign(maps, maps + count);
  std::vector<A> parts(rows ? shape.chunks() * (count + 1) * c : 0);
#pragma omp parallel num_threads(threads)
  {
    if (p.own.pooled != nullptr) team_through(c, p.own);
    if (rows) {
      team_sum<PRODUCTS>(sum, p.out, p.kind, nullptr, parts.data());
      team_merge(shape, parts.data(), count + 1, rows, grad_scales, grad_bias);
    } else {
      team_sum<NOTHING>(sum, p.out, p.kind, nullptr, static_cast<A*>(nullptr));
    }
  }
}

// `pull` of what `block` made, on to the gradients of all that it took. `branch`, or null where its norm is given.
template <class A>
void pull_block(const Shape& shape, const Pull<A>& p, const Pairs<A>& pairs, const PairGradients<A>& to,
                const Through<A>* branch, void* branch_out, int threads) {
  const int64_t c = shape.channels;
  const std::vector<A> zeros(c), ones(c, A(1));
  Sum<A> sum = sum_of(shape, p, zeros.data(), ones.data());
  sum.others.assign(pairs.maps, pairs.maps + pairs.count);
  std::vector<A> parts(shape.chunks() * (pairs.count + 1) * c);
  Sum<A> back{shape, branch == nullptr ? zeros.data() : branch->offset, 1};
  if (pairs.branch) {
    if (branch != nullptr) back.terms.push_back({pairs.maps[0], branch->slope, 1});
    back.terms.push_back({Map{p.out, p.kind}, pairs.scales, pairs.rows});
  }
#pragma omp parallel num_threads(threads)
  {
    if (p.own.pooled != nullptr) team_through(c, p.own);
    if (pairs.rates != nullptr) team_coefficients(c, pairs);
    team_sum<PRODUCTS>(sum, p.out, p.kind, nullptr, parts.data());
    team_merge(shape, parts.data(), pairs.count + 1, pairs.rows, to.scales, to.bias);
    if (pairs.rates != nullptr) team_coefficients_backward(c, pairs, to);
    if (branch != nullptr) team_through(c, *branch);
    if (pairs.branch) team_sum<NOTHING>(back, branch_out, pairs.maps[0].kind, nullptr, static_cast<A*>(nullptr));
  }
}

template <class A>
void mix(const Shape& shape, const Map* maps, int64_t count, const A* scales, int64_t outputs, int64_t rows,
         void* const* out, int32_t kind, int threads) {
  const int64_t c = shape.channels;
  const std::vector<A> zeros(c);
  std::vector<Sum<A>> sums(outputs, Sum<A>{shape, zeros.data(), 1});
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < count; ++i) sums[o].terms.push_back({maps[i], scales + (o * count + i) * rows * c, rows});
#pragma omp parallel num_threads(threads)
  {
    typename Sum<A>::Scratch scratch = sums[0].scratch(kind);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      by_groups(chunk, [&](int64_t row, int64_t group) {  // rows of each map stay in cache for all outputs
        for (int64_t o = 0; o < outputs; ++o)
          sums[o].template run_rows<NOTHING>(chunk, row, group, out[o], kind, nullptr, scratch);
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
void nested(const Nested<A>& p) {
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
void nested_backward(const Nested<A>& p, const A* grad_rate, const A* grad_shift, A* to_mean, A* to_var, A* to_weight,
                     A* to_bias) {
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

// One step of running statistics towards those of a batch.
template <class A>
void move(int64_t c, const A* mean, const A* var, double unbiased, double step, A* running_mean, A* running_var) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    running_mean[j] += A(step) * (mean[j] - running_mean[j]);
    running_var[j] += A(step) * (var[j] * A(unbiased) - running_var[j]);
  }
}

template <class A>
void dots(const Shape& shape, const Map* grads, int64_t grad_count, const Map* maps, int64_t count, int64_t rows,
          A* out, int threads) {
  const int64_t c = shape.channels, terms = grad_count * count, room = GROUP * room_of(shape);
  std::vector<A> parts(shape.chunks() * terms * c);
#pragma omp parallel num_threads(threads)
  {
    std::vector<A> buffer((grad_count + 1) * room);
    std::vector<Rows<A>> taken(grad_count);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      A* sums = parts.data() + index * terms * c;
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
    team_merge(shape, parts.data(), terms, rows, out, static_cast<A*>(nullptr));
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

#define EXPORT(A, SUFFIX)                                                                                             \
  void enter_##SUFFIX(Shape shape, Map x, const Form<A>* form, const Form<A>* inner, int threads) {                   \
    enter(shape, x, *form, inner, threads);                                                                           \
  }                                                                                                                   \
  void block_##SUFFIX(Shape shape, const Map* addends, int64_t addend_count, const Form<A>* norm,                     \
                      const Pairs<A>* pairs, bool relu, void* y, int32_t kind, const Form<A>* own, int threads) {     \
    block(shape, addends, addend_count, norm, *pairs, relu, y, kind, *own, threads);                                  \
  }                                                                                                                   \
  void pull_##SUFFIX(Shape shape, const Pull<A>* p, const Map* maps, int64_t count, int64_t rows, A* grad_scales,     \
                     A* grad_bias, int threads) {                                                                     \
    pull(shape, *p, maps, count, rows, grad_scales, grad_bias, threads);                                              \
  }                                                                                                                   \
  void pull_block_##SUFFIX(Shape shape, const Pull<A>* p, const Pairs<A>* pairs, const PairGradients<A>* to,          \
                           const Through<A>* branch, void* branch_out, int threads) {                                 \
    pull_block(shape, *p, *pairs, *to, branch, branch_out, threads);                                                  \
  }                                                                                                                   \
  void mix_##SUFFIX(Shape shape, const Map* maps, int64_t count, const A* scales, int64_t outputs, int64_t rows,      \
                    void* const* out, int32_t kind, int threads) {                                                    \
    mix(shape, maps, count, scales, outputs, rows, out, kind, threads);                                               \
  }                                                                                                                   \
  void dots_##SUFFIX(Shape shape, const Map* grads, int64_t grad_count, const Map* maps, int64_t count, int64_t rows, \
                     A* out, int threads) {                                                                           \
    dots(shape, grads, grad_count, maps, count, rows, out, threads);                                                  \
  }                                                                                                                   \
  void running_##SUFFIX(int64_t c, const Form<A>* form) { team_running(c, *form); }                                    \
  void nested_##SUFFIX(const Nested<A>* p) { nested(*p); }                                                             \
  void nested_backward_##SUFFIX(const Nested<A>* p, const A* grad_rate, const A* grad_shift, A* to_mean, A* to_var,   \
                                A* to_weight, A* to_bias) {                                                           \
    nested_backward(*p, grad_rate, grad_shift, to_mean, to_var, to_weight, to_bias);                                  \
  }                                                                                                                   \
  void move_##SUFFIX(int64_t c, const A* mean, const A* var, double unbiased, double step, A* running_mean,           \
                     A* running_var) {                                                                                \
    move(c, mean, var, unbiased, step, running_mean, running_var);                                                    \
  }

EXPORT(float, f32)
EXPORT(double, f64)
}
