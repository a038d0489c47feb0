// The kernels of the operator for the CPU: see reference.py for what each one computes and native.py for how it is built.
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
constexpr int64_t GROUP = 4;    // rows, or maps, taken in one pass over registers

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

enum End { NONE, RELU, MASK };

// acc = start + sum over M terms of a[m] * x[m], then ReLU or a mask. Coefficients vary along a row with channels_last
// and are one number else; so is `start` in the first pass over a row (FIRST), where later ones go on from acc.
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
    default: return pass<A, 4, LAST, FIRST, END>(n, start, x, a, mask, acc);
  }
}

// A weighted sum of maps, row by row.
template <class A>
struct Sum {
  struct Term {
    Map map;
    const A* scale;  // (rows, C)
    int64_t rows;
  };
  const Shape& shape;
  const A* start;  // (start_rows, C), or zeros of shape (1, C)
  int64_t start_rows;
  std::vector<Term> terms;

  // What a thread needs for it.
  struct Scratch {
    std::vector<A> rows;
    std::vector<const A*> x, a;
    explicit Scratch(const Shape& shape) : rows((GROUP + 1) * room_of(shape)), x(GROUP), a(GROUP) {}
    A* row(const Shape& shape, int64_t i) { return rows.data() + i * room_of(shape); }
  };

  template <End END>
  void row(const Chunk& chunk, int64_t row, const A* mask, A* acc, Scratch& scratch) const {
    const int64_t count = terms.size(), n = chunk.columns();
    int64_t done = 0;
    do {
      const int64_t m = std::min(GROUP, count - done);
      for (int64_t i = 0; i < m; ++i) {
        const Term& term = terms[done + i];
        scratch.x[i] = row_of(term.map, chunk, row, scratch.row(shape, i));
        scratch.a[i] = coefficient(term.scale, term.rows, chunk, row);
      }
      const A* from = done == 0 ? coefficient(start, start_rows, chunk, row) : acc;
      const bool ends = done + m == count;
      if (shape.last) {
        if (ends) pass_of<A, true, false, END>(m, n, from, scratch.x.data(), scratch.a.data(), mask, acc);
        else pass_of<A, true, false, NONE>(m, n, from, scratch.x.data(), scratch.a.data(), mask, acc);
      } else if (done == 0) {
        if (ends) pass_of<A, false, true, END>(m, n, from, scratch.x.data(), scratch.a.data(), mask, acc);
        else pass_of<A, false, true, NONE>(m, n, from, scratch.x.data(), scratch.a.data(), mask, acc);
      } else {
        if (ends) pass_of<A, false, false, END>(m, n, from, scratch.x.data(), scratch.a.data(), mask, acc);
        else pass_of<A, false, false, NONE>(m, n, from, scratch.x.data(), scratch.a.data(), mask, acc);
      }
      done += m;
    } while (done < count);
  }
};

// sums[c] += sum over up to GROUP rows of x * y, of x alone where y is null.
template <class A>
void add_products(A* sums, const Chunk& chunk, int64_t row, int64_t rows, const A* const* x, const A* const* y) {
  const int64_t n = chunk.columns();
  if (chunk.shape.last && rows == GROUP) {
    const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    if (y == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sums[j] += (x0[j] + x1[j]) + (x2[j] + x3[j]);
    } else {
      const A *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sums[j] += (x0[j] * y0[j] + x1[j] * y1[j]) + (x2[j] * y2[j] + x3[j] * y3[j]);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (chunk.shape.last) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sums[j] += y == nullptr ? x[r][j] : x[r][j] * y[r][j];
    } else {
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += y == nullptr ? x[r][j] : x[r][j] * y[r][j];
      sums[row + r] += sum;
    }
  }
}

// Sums of (x - shift) and (x - shift)^2 over the pixels of a chunk. The shift, the chunk's first pixel, keeps the
// variance of maps with a large mean from cancelling.
template <class A>
struct Moments {
  std::vector<A> shift, sum, square;
  explicit Moments(int64_t channels) : shift(channels), sum(channels), square(channels) {}

  void reset() {
    std::fill(sum.begin(), sum.end(), A(0));
    std::fill(square.begin(), square.end(), A(0));
  }
  void add(const Chunk& chunk, int64_t row, int64_t rows, const A* const* x) {
    const int64_t n = chunk.columns();
    A *k = shift.data(), *s = sum.data(), *q = square.data();
    if (!chunk.shape.last) {
      for (int64_t r = 0; r < rows; ++r) add_channel(row + r, n, x[r]);
      return;
    }
    if (row == 0) std::copy(x[0], x[0] + n, k);
    if (rows == GROUP) {
      const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A d0 = x0[j] - k[j], d1 = x1[j] - k[j], d2 = x2[j] - k[j], d3 = x3[j] - k[j];
        s[j] += (d0 + d1) + (d2 + d3);
        q[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A d = x[r][j] - k[j];
        s[j] += d;
        q[j] += d * d;
      }
    }
  }
  // mean and sum of squares about it, of a chunk
  void write(double* mean, double* about, int64_t pixels) const {
    for (size_t c = 0; c < sum.size(); ++c) {
      const double s = sum[c], rest = square[c] - s * s / pixels;
      mean[c] = shift[c] + s / pixels;
      about[c] = rest < 0 ? 0 : rest;  // keeps NaN
    }
  }

 private:
  void add_channel(int64_t channel, int64_t n, const A* x) {
    const A k = shift[channel] = x[0];
    A s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
    for (int64_t j = 0; j < n; ++j) {
      const A d = x[j] - k;
      s += d;
      q += d * d;
    }
    sum[channel] = s;
    square[channel] = q;
  }
};

// Moments of images from those of their chunks, (chunks, 2, C), by Chan's formula.
template <class A>
void merge_moments(const Shape& shape, const std::vector<double>& parts, A* mean, A* var) {
  const int64_t c = shape.channels, splits = shape.splits();
  for (int64_t image = 0; image < shape.images; ++image)
    for (int64_t j = 0; j < c; ++j) {
      double count = 0, m = 0, about = 0;
      for (int64_t split = 0; split < splits; ++split) {
        const double* part = parts.data() + (image * splits + split) * 2 * c;
        const double more = double(chunk_pixels(shape, split)), total = count + more, delta = part[j] - m;
        m += delta * more / total;
        about += part[c + j] + delta * delta * count * more / total;
        count = total;
      }
      mean[image * c + j] = A(m);
      var[image * c + j] = A(about / count);
    }
}

// `count` of the terms from `first` on, as (count, rows, C), from sums of chunks, (chunks, terms, C).
template <class A>
void merge_sums(const Shape& shape, const std::vector<A>& parts, int64_t terms, int64_t first, int64_t count,
                int64_t rows, A* out) {
  const int64_t c = shape.channels, per_row = rows > 1 ? shape.splits() : shape.chunks();
  std::vector<double> total(c);
  for (int64_t term = first; term < first + count; ++term)
    for (int64_t row = 0; row < rows; ++row) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t k = 0; k < per_row; ++k) {
        const A* part = parts.data() + ((row * per_row + k) * terms + term) * c;
        for (int64_t j = 0; j < c; ++j) total[j] += part[j];
      }
      for (int64_t j = 0; j < c; ++j) *out++ = A(total[j]);
    }
}


// Runs f(chunk, row, rows) over the rows of a chunk, GROUP at a time.
template <class F>
void by_groups(const Chunk& chunk, F f) {
  for (int64_t row = 0; row < chunk.rows(); row += GROUP) f(row, std::min(GROUP, chunk.rows() - row));
}

template <class A>
using Rows = std::array<const A*, GROUP>;

template <class A>
void moments(const Shape& shape, Map x, A* mean, A* var, int threads) {
  std::vector<double> parts(shape.chunks() * 2 * shape.channels);
#pragma omp parallel num_threads(threads)
  {
    typename Sum<A>::Scratch scratch(shape);
    Moments<A> sums(shape.channels);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      sums.reset();
      by_groups(chunk, [&](int64_t row, int64_t rows) {
        Rows<A> taken{};
        for (int64_t r = 0; r < rows; ++r) taken[r] = row_of(x, chunk, row + r, scratch.row(shape, r));
        sums.add(chunk, row, rows, taken.data());
      });
      double* part = parts.data() + index * 2 * shape.channels;
      sums.write(part, part + shape.channels, chunk.pixels);
    }
  }
  merge_moments(shape, parts, mean, var);
}

template <class A>
void join(const Shape& shape, const Map* addends, int64_t addend_count, const Map* maps, int64_t count,
          const A* scales, int64_t rows, const A* bias, bool relu, void* y, int32_t kind, A* mean, A* var, int threads) {
  const int64_t c = shape.channels;
  const std::vector<A> zeros(c), ones(c, A(1));
  Sum<A> sum{shape, bias == nullptr ? zeros.data() : bias, bias == nullptr ? 1 : rows, {}};
  for (int64_t i = 0; i < addend_count; ++i) sum.terms.push_back({addends[i], ones.data(), 1});
  for (int64_t i = 0; i < count; ++i) sum.terms.push_back({maps[i], scales + i * rows * c, rows});
  std::vector<double> parts(mean == nullptr ? 0 : shape.chunks() * 2 * c);
#pragma omp parallel num_threads(threads)
  {
    typename Sum<A>::Scratch scratch(shape);
    std::vector<A> buffer(GROUP * room_of(shape));
    Moments<A> sums(c);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      sums.reset();
      by_groups(chunk, [&](int64_t row, int64_t count) {
        Rows<A> done{};
        for (int64_t r = 0; r < count; ++r) {
          A* acc = place(y, kind, chunk, row + r, buffer.data() + r * room_of(shape));
          if (relu) sum.template row<RELU>(chunk, row + r, nullptr, acc, scratch);
          else sum.template row<NONE>(chunk, row + r, nullptr, acc, scratch);
          put(y, kind, chunk, row + r, acc);
          // the moments are those of what was stored, which may have been rounded
          done[r] = mean == nullptr ? acc : row_of(Map{y, kind}, chunk, row + r, acc);
        }
        if (mean != nullptr) sums.add(chunk, row, count, done.data());
      });
      if (mean != nullptr) {
        double* part = parts.data() + index * 2 * c;
        sums.write(part, part + c, chunk.pixels);
      }
    }
  }
  if (mean != nullptr) merge_moments(shape, parts, mean, var);
}

template <class A>
void pull(const Shape& shape, Map x, const Map* grad, const A* offset, const A* slope, int64_t moment_rows,
          const Map* later, const A* const* later_scales, const int64_t* later_rows, int64_t later_count,
          const Map* maps, int64_t count, int64_t rows, bool relu, void* out, int32_t kind, A* grad_scales,
          A* grad_bias, int threads) {
  const int64_t c = shape.channels, terms = count + 1;
  const std::vector<A> zeros(c), ones(c, A(1));
  Sum<A> sum{shape, offset == nullptr ? zeros.data() : offset, offset == nullptr ? 1 : moment_rows, {}};
  if (grad != nullptr) sum.terms.push_back({*grad, ones.data(), 1});
  if (slope != nullptr) sum.terms.push_back({x, slope, moment_rows});
  for (int64_t l = 0; l < later_count; ++l) sum.terms.push_back({later[l], later_scales[l], later_rows[l]});
  std::vector<A> parts(grad_bias == nullptr ? 0 : shape.chunks() * terms * c);
#pragma omp parallel num_threads(threads)
  {
    typename Sum<A>::Scratch scratch(shape);
    std::vector<A> buffer(GROUP * room_of(shape));
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      A* sums = grad_bias == nullptr ? nullptr : parts.data() + index * terms * c;
      by_groups(chunk, [&](int64_t row, int64_t group) {
        Rows<A> done{}, other{};
        for (int64_t r = 0; r < group; ++r) {
          A* acc = place(out, kind, chunk, row + r, buffer.data() + r * room_of(shape));
          if (relu) {
            const A* mask = row_of(x, chunk, row + r, scratch.row(shape, GROUP));
            sum.template row<MASK>(chunk, row + r, mask, acc, scratch);
          } else {
            sum.template row<NONE>(chunk, row + r, nullptr, acc, scratch);
          }
          put(out, kind, chunk, row + r, acc);
          done[r] = acc;
        }
        if (sums == nullptr) return;
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t r = 0; r < group; ++r) other[r] = row_of(maps[i], chunk, row + r, scratch.row(shape, r));
          add_products(sums + i * c, chunk, row, group, done.data(), other.data());
        }
        add_products<A>(sums + count * c, chunk, row, group, done.data(), nullptr);
      });
    }
  }
  if (grad_bias != nullptr) {
    merge_sums(shape, parts, terms, 0, count, rows, grad_scales);
    merge_sums(shape, parts, terms, count, 1, rows, grad_bias);
  }
}

template <class A>
void mix(const Shape& shape, const Map* maps, int64_t count, const A* scales, int64_t outputs, int64_t rows,
         void* const* out, int32_t kind, int threads) {
  const int64_t c = shape.channels;
  const std::vector<A> zeros(c);
  std::vector<Sum<A>> sums(outputs, Sum<A>{shape, zeros.data(), 1, {}});
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < count; ++i) sums[o].terms.push_back({maps[i], scales + (o * count + i) * rows * c, rows});
#pragma omp parallel num_threads(threads)
  {
    typename Sum<A>::Scratch scratch(shape);
    std::vector<A> buffer(room_of(shape));
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      for (int64_t row = 0; row < chunk.rows(); ++row)  // a row of each map stays in cache for all outputs
        for (int64_t o = 0; o < outputs; ++o) {
          A* acc = place(out[o], kind, chunk, row, buffer.data());
          sums[o].template row<NONE>(chunk, row, nullptr, acc, scratch);
          put(out[o], kind, chunk, row, acc);
        }
    }
  }
}

template <class A>
void dots(const Shape& shape, const Map* grads, int64_t grad_count, const Map* maps, int64_t count, int64_t rows,
          A* out, int threads) {
  const int64_t c = shape.channels, terms = grad_count * count, room = room_of(shape);
  std::vector<A> parts(shape.chunks() * terms * c);
#pragma omp parallel num_threads(threads)
  {
    std::vector<A> buffer((grad_count + 1) * GROUP * room);
    std::vector<Rows<A>> taken(grad_count);
#pragma omp for
    for (int64_t index = 0; index < shape.chunks(); ++index) {
      const Chunk chunk(shape, index);
      A* sums = parts.data() + index * terms * c;
      by_groups(chunk, [&](int64_t row, int64_t group) {
        for (int64_t g = 0; g < grad_count; ++g)
          for (int64_t r = 0; r < group; ++r)
            taken[g][r] = row_of(grads[g], chunk, row + r, buffer.data() + (g * GROUP + r) * room);
        Rows<A> x{};
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t r = 0; r < group; ++r)
            x[r] = row_of(maps[i], chunk, row + r, buffer.data() + (grad_count * GROUP + r) * room);
          for (int64_t g = 0; g < grad_count; ++g)
            add_products(sums + (g * count + i) * c, chunk, row, group, taken[g].data(), x.data());
        }
      });
    }
  }
  merge_sums(shape, parts, terms, 0, terms, rows, out);
}

// The arithmetic per channel, see forms.py. Statistics are kept in double until they are handed out.
template <class A>
void form(int64_t images, int64_t c, const A* mean, const A* var, int64_t groups, double eps, const A* weight,
          const A* bias, A* rate, A* shift, A* pooled, A* variance) {
  const bool batch = groups == 0;
  const int64_t outer = batch ? c : images * groups, size = batch ? images : c / groups;
  for (int64_t set = 0; set < outer; ++set) {
    const int64_t start = batch ? set : set * size, step = batch ? c : 1;
    double m = 0, v = 0;
    for (int64_t i = 0; i < size; ++i) m += mean[start + i * step];
    m /= size;
    for (int64_t i = 0; i < size; ++i) {
      const double d = mean[start + i * step] - m;
      v += var[start + i * step] + d * d;
    }
    v /= size;
    pooled[set] = A(m);
    variance[set] = A(v);
    const double t = 1 / std::sqrt(v + eps);
    for (int64_t i = 0; i < (batch ? 1 : size); ++i) {
      const int64_t channel = (start + i) % c;
      const double r = weight == nullptr ? t : weight[channel] * t;
      rate[start + i] = A(r);
      shift[start + i] = A((bias == nullptr ? 0 : double(bias[channel])) - m * r);
    }
  }
}

template <class A>
void form_backward(int64_t rows, int64_t c, const A* pooled, const A* variance, int64_t groups, double eps,
                   const A* weight, const A* grad_rate, const A* grad_shift, double count, A* offset, A* slope,
                   A* grad_weight, A* grad_bias) {
  const int64_t size = groups == 0 ? 1 : c / groups, sets = rows * c / size;
  std::vector<double> to_weight(c), to_bias(c);
  for (int64_t set = 0; set < sets; ++set) {
    const double m = pooled[set], t = 1 / std::sqrt(variance[set] + eps);
    double through = 0, moved = 0;
    for (int64_t i = set * size; i < (set + 1) * size; ++i) {
      const int64_t channel = i % c;
      const double w = weight == nullptr ? 1 : weight[channel], own = grad_rate[i] - m * grad_shift[i];
      to_weight[channel] += own * t;
      to_bias[channel] += grad_shift[i];
      through += w * own;
      moved += w * grad_shift[i];
    }
    const double tilt = -through * t * t * t / count, start = -moved * t / count - tilt * m;
    for (int64_t i = set * size; i < (set + 1) * size; ++i) {
      slope[i] = A(tilt);
      offset[i] = A(start);
    }
  }
  for (int64_t j = 0; j < c; ++j) {
    grad_weight[j] = A(to_weight[j]);
    grad_bias[j] = A(to_bias[j]);
  }
}

template <class A>
void coefficients(int64_t rows, int64_t c, int64_t maps, int64_t first, const A* weight, const A* const* rates,
                  const A* const* shifts, const A* branch_rate, const A* branch_shift, A* scales, A* bias) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < c; ++j) bias[row * c + j] = branch_shift == nullptr ? A(0) : branch_shift[j];
  if (branch_rate != nullptr)
    for (int64_t row = 0; row < rows; ++row, scales += c) std::copy(branch_rate, branch_rate + c, scales);
  for (int64_t i = 0; i < maps; ++i) {
    const A* w = weight + i * c;
    for (int64_t row = 0; row < rows; ++row) {
      const A *rate = rates[i] + row * c, *shift = shifts[i] + row * c;
      A* to = bias + row * c;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) to[j] += w[j] * shift[j];
      if (i < first) continue;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) scales[j] = w[j] * rate[j];
      scales += c;
    }
  }
}

template <class A>
void coefficients_backward(int64_t rows, int64_t c, int64_t maps, int64_t first, const A* weight,
                           const A* const* rates, const A* const* shifts, bool has_branch, const A* grad_scales,
                           const A* grad_bias, A* grad_weight, A* grad_rates, A* grad_shifts, A* grad_branch_rate,
                           A* grad_branch_shift) {
  if (has_branch) {
    std::fill(grad_branch_rate, grad_branch_rate + c, A(0));
    std::fill(grad_branch_shift, grad_branch_shift + c, A(0));
    for (int64_t row = 0; row < rows; ++row, grad_scales += c)
      for (int64_t j = 0; j < c; ++j) {
        grad_branch_rate[j] += grad_scales[j];
        grad_branch_shift[j] += grad_bias[row * c + j];
      }
  }
  std::fill(grad_weight, grad_weight + maps * c, A(0));
  for (int64_t i = 0; i < maps; ++i) {
    const A* w = weight + i * c;
    A* to = grad_weight + i * c;
    for (int64_t row = 0; row < rows; ++row) {
      const A *rate = rates[i] + row * c, *shift = shifts[i] + row * c, *gb = grad_bias + row * c;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) {
        to[j] += shift[j] * gb[j];
        grad_shifts[j] = w[j] * gb[j];
      }
      grad_shifts += c;
      if (i < first) continue;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) {
        to[j] += rate[j] * grad_scales[j];
        grad_rates[j] = w[j] * grad_scales[j];
      }
      grad_rates += c;
      grad_scales += c;
    }
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
  void moments_##SUFFIX(Shape shape, Map x, A* mean, A* var, int threads) { moments(shape, x, mean, var, threads); }  \
  void join_##SUFFIX(Shape shape, const Map* addends, int64_t addend_count, const Map* maps, int64_t count,           \
                     const A* scales, int64_t rows, const A* bias, bool relu, void* y, int32_t kind, A* mean, A* var, \
                     int threads) {                                                                                   \
    join(shape, addends, addend_count, maps, count, scales, rows, bias, relu, y, kind, mean, var, threads);           \
  }                                                                                                                   \
  void pull_##SUFFIX(Shape shape, Map x, const Map* grad, const A* offset, const A* slope, int64_t moment_rows,       \
                     const Map* later, const A* const* later_scales, const int64_t* later_rows, int64_t later_count,  \
                     const Map* maps, int64_t count, int64_t rows, bool relu, void* out, int32_t kind,                \
                     A* grad_scales, A* grad_bias, int threads) {                                                     \
    pull(shape, x, grad, offset, slope, moment_rows, later, later_scales, later_rows, later_count, maps, count, rows, \
         relu, out, kind, grad_scales, grad_bias, threads);                                                           \
  }                                                                                                                   \
  void mix_##SUFFIX(Shape shape, const Map* maps, int64_t count, const A* scales, int64_t outputs, int64_t rows,      \
                    void* const* out, int32_t kind, int threads) {                                                    \
    mix(shape, maps, count, scales, outputs, rows, out, kind, threads);                                               \
  }                                                                                                                   \
  void dots_##SUFFIX(Shape shape, const Map* grads, int64_t grad_count, const Map* maps, int64_t count, int64_t rows, \
                     A* out, int threads) {                                                                           \
    dots(shape, grads, grad_count, maps, count, rows, out, threads);                                                  \
  }

#define EXPORT_FORMS(A, SUFFIX)                                                                                       \
  void form_##SUFFIX(int64_t images, int64_t c, const A* mean, const A* var, int64_t groups, double eps,              \
                     const A* weight, const A* bias, A* rate, A* shift, A* pooled, A* variance) {                     \
    form(images, c, mean, var, groups, eps, weight, bias, rate, shift, pooled, variance);                             \
  }                                                                                                                   \
  void form_backward_##SUFFIX(int64_t rows, int64_t c, const A* pooled, const A* variance, int64_t groups,            \
                              double eps, const A* weight, const A* grad_rate, const A* grad_shift, double count,     \
                              A* offset, A* slope, A* grad_weight, A* grad_bias) {                                    \
    form_backward(rows, c, pooled, variance, groups, eps, weight, grad_rate, grad_shift, count, offset, slope,        \
                  grad_weight, grad_bias);                                                                            \
  }                                                                                                                   \
  void coefficients_##SUFFIX(int64_t rows, int64_t c, int64_t maps, int64_t first, const A* weight,                   \
                             const A* const* rates, const A* const* shifts, const A* branch_rate,                     \
                             const A* branch_shift, A* scales, A* bias) {                                             \
    coefficients(rows, c, maps, first, weight, rates, shifts, branch_rate, branch_shift, scales, bias);               \
  }                                                                                                                   \
  void coefficients_backward_##SUFFIX(int64_t rows, int64_t c, int64_t maps, int64_t first, const A* weight,          \
                                      const A* const* rates, const A* const* shifts, bool has_branch,                 \
                                      const A* grad_scales, const A* grad_bias, A* grad_weight, A* grad_rates,        \
                                      A* grad_shifts, A* grad_branch_rate, A* grad_branch_shift) {                    \
    coefficients_backward(rows, c, maps, first, weight, rates, shifts, has_branch, grad_scales, grad_bias,            \
                          grad_weight, grad_rates, grad_shifts, grad_branch_rate, grad_branch_shift);                 \
  }

EXPORT(float, f32)
EXPORT_FORMS(float, f32)
EXPORT_FORMS(double, f64)
EXPORT(double, f64)
}
