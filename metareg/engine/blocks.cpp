// BatchNorm with the activation and pooling that follow it, for images that lie channels last in memory.
//
// A block computes y = max over each window of a(scale * x + shift), with scale = weight * rstd, shift = bias - mean * scale
// and a(v) = v if v > 0, slope * v otherwise. Windows have 1 or 2x2 pixels and do not overlap; rows and columns that fill no
// window are dropped. Only x is kept for derivatives: each finds the maxima again, which costs less than reading them.
//
// Images are [images, height, width, channels], results of windows [images, height / window, width / window, channels]. Their
// type X is the type T of all arithmetic and of the numbers per channel, or bfloat16 with T = float.
// Sums are per image, then over images in double precision, so they do not depend on the number of threads.

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

using Size = std::int64_t;
constexpr Size kSmallest = 1 << 16;  // numbers for which starting threads takes longer than it saves
constexpr Size kRows = 64;           // pixels whose sums are in the type of the images

struct Shape {
  Size images, height, width, channels, window, threads;
  Size examples;  // the first images, whose statistics all are normalised with
  Size rows() const { return height / window; }
  Size columns() const { return width / window; }
  Size pixels() const { return height * width; }
};

// The threads of the OpenMP library that torch has loaded. Other threads would wait for a core: for milliseconds after an
// operation, OpenMP's own keep theirs busy.
struct Team {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int (*number)();
  int (*size)();
  static const Team& find() {
    static const Team team = {
        reinterpret_cast<decltype(run)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
        reinterpret_cast<decltype(number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
        reinterpret_cast<decltype(size)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
    return team;
  }
};

template <class Function>
struct Work {
  const Function& function;
  Size images;
  void take(Size part, Size parts) const { function(part * images / parts, (part + 1) * images / parts); }
};

template <class Function>
void for_images(const Shape& s, Function function) {
  const Size threads = s.images * s.pixels() * s.channels < kSmallest ? 1 : std::min(s.threads, s.images);
  const Team& team = Team::find();
  Work<Function> work{function, s.images};
  if (threads <= 1) {
    work.take(0, 1);
  } else if (team.run && team.number && team.size) {
    auto take = [](void* data) { static_cast<Work<Function>*>(data)->take(Team::find().number(), Team::find().size()); };
    team.run(take, &work, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (Size k = 1; k < threads; ++k) others.emplace_back([&work, k, threads] { work.take(k, threads); });
    work.take(0, threads);
    for (auto& each : others) each.join();
  }
}

template <class T>
struct Affine {
  std::vector<T> scale, shift;
  Affine(Size channels, const T* weight, const T* bias, const T* mean, const T* rstd) : scale(channels), shift(channels) {
    for (Size c = 0; c < channels; ++c) {
      scale[c] = weight[c] * rstd[c];
      shift[c] = T(double(bias[c]) - double(mean[c]) * double(scale[c]));
    }
  }
};

// Several numbers of neighbouring channels, for which compilers have arithmetic and comparisons.
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Type __attribute__((vector_size(64)));
};
template <>
struct Lanes<double> {
  typedef double Type __attribute__((vector_size(64)));
};

// The upper half of a float.
struct Bfloat16 {
  std::uint16_t bits;
};
template <class V>
struct Bits;  // of the numbers of V, and of their upper halves
template <>
struct Bits<float> {
  typedef std::uint32_t Whole;
  typedef std::uint16_t Half;
};
template <>
struct Bits<Lanes<float>::Type> {
  typedef std::uint32_t Whole __attribute__((vector_size(64)));
  typedef std::uint16_t Half __attribute__((vector_size(32)));
};

template <class To, class From>
inline To convert(const From& from) {
  if constexpr (std::is_arithmetic_v<From>)
    return To(from);
  else
    return __builtin_convertvector(from, To);
}

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <class V>
inline V load(const Bfloat16* from) {
  typename Bits<V>::Half half;
  std::memcpy(&half, from, sizeof(half));
  const auto whole = convert<typename Bits<V>::Whole>(half) << 16;
  V value;
  std::memcpy(&value, &whole, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* to, const V& value) {
  std::memcpy(to, &value, sizeof(V));
}
// Rounds to the nearest number, and to the even one of two.
template <class V>
inline void store(Bfloat16* to, const V& value) {
  typename Bits<V>::Whole whole;
  std::memcpy(&whole, &value, sizeof(V));
  const auto rounded = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
  const auto half = convert<typename Bits<V>::Half>(value == value ? rounded : rounded * 0 + 0x7fc0);
  std::memcpy(to, &half, sizeof(half));
}

// Calls function(value of the type to compute with, first channel) for all channels.
template <class T, class Function>
inline void for_channels(Size channels, Function function) {
  using V = typename Lanes<T>::Type;
  constexpr Size lanes = sizeof(V) / sizeof(T);
  Size c = 0;
  for (; c + lanes <= channels; c += lanes) function(V{}, c);
  for (; c < channels; ++c) function(T{}, c);
}

// The values in a window after the affine function, of which the first maximum is chosen.
template <class V, int K>
struct Window;

template <class V>
struct Window<V, 1> {
  V best;
  template <class X>
  Window(const X* x, Size, Size, const V& scale, const V& shift) : best(load<V>(x) * scale + shift) {}
  template <class X>
  V pick(const X* v, Size, Size) const {
    return load<V>(v);
  }
  // Adds a value at the maximum, and elsewhere nothing, to an affine function of v.
  template <class X>
  void place(X* out, const X* v, Size, Size, const V& value, const V& constant, const V& slant) const {
    store(out, constant + slant * load<V>(v) + value);
  }
};

template <class V>
struct Window<V, 2> {
  V a, b, c, d, ab, abc, best;
  template <class X>
  Window(const X* x, Size right, Size down, const V& scale, const V& shift) {
    a = load<V>(x) * scale + shift, b = load<V>(x + right) * scale + shift;
    c = load<V>(x + down) * scale + shift, d = load<V>(x + down + right) * scale + shift;
    ab = b > a ? b : a;
    abc = c > ab ? c : ab;
    best = d > abc ? d : abc;
  }
  template <class X>
  V pick(const X* v, Size right, Size down) const {
    const V first = b > a ? load<V>(v + right) : load<V>(v);
    const V upper = c > ab ? load<V>(v + down) : first;
    return d > abc ? load<V>(v + down + right) : upper;
  }
  template <class X>
  void place(X* out, const X* v, Size right, Size down, const V& value, const V& constant, const V& slant) const {
    const V zero = V{};
    const V to_d = d > abc ? value : zero, to_abc = d > abc ? zero : value;
    const V to_c = c > ab ? to_abc : zero, to_ab = c > ab ? zero : to_abc;
    const V to_b = b > a ? to_ab : zero, to_a = b > a ? zero : to_ab;
    const V rest_a = constant + slant * load<V>(v), rest_b = constant + slant * load<V>(v + right);
    const V rest_c = constant + slant * load<V>(v + down), rest_d = constant + slant * load<V>(v + down + right);
    store(out, rest_a + to_a), store(out + right, rest_b + to_b);
    store(out + down, rest_c + to_c), store(out + down + right, rest_d + to_d);
  }
};

// Calls function(offset of a window's first pixel, offset of its result) for the windows of a row.
template <class Function>
void for_windows(const Shape& s, Size image, Size row, Function function) {
  const Size first = (image * s.height + row * s.window) * s.width * s.channels;
  const Size result = (image * s.rows() + row) * s.columns() * s.channels;
  for (Size column = 0; column < s.columns(); ++column)
    function(first + column * s.window * s.channels, result + column * s.channels);
}

template <class X, class T>
void statistics(const Shape& s, const X* x, double eps, T* mean, T* rstd) {
  const Size channels = s.channels, pixels = s.pixels();
  std::vector<double> means(s.images * channels), squares(s.images * channels);
  for_images(s, [&](Size begin, Size end) {
    std::vector<T> averages(channels), deviations(channels);  // of a block of rows
    for (Size image = begin; image < end; ++image) {
      double* m = &means[image * channels];
      double* q = &squares[image * channels];
      for (Size done = 0; done < pixels; done += kRows) {
        const Size rows = std::min(kRows, pixels - done);
        const X* const block = x + (image * pixels + done) * channels;
        const T share = T(1) / T(rows);
        for_channels<T>(channels, [&](auto type, Size c) {
          using V = decltype(type);
          constexpr Size lanes = sizeof(V) / sizeof(T);
          V sum{}, deviation{};
          for (Size r = 0; r < rows; ++r) {
            __builtin_prefetch(block + rows * (channels + c) + r * lanes);  // the next block, in order
            sum += load<V>(block + r * channels + c);
          }
          const V average = sum * share;
          for (Size r = 0; r < rows; ++r) {
            const V step = load<V>(block + r * channels + c) - average;
            deviation += step * step;
          }
          store(&averages[c], average);
          store(&deviations[c], deviation);
        });
        const double fraction = double(rows) / double(done + rows);
        for (Size c = 0; c < channels; ++c) {
          const double step = double(averages[c]) - m[c];
          m[c] += step * fraction;
          q[c] += double(deviations[c]) + step * step * double(done) * fraction;
        }
      }
    }
  });
  for (Size c = 0; c < channels; ++c) {
    double whole = 0, square = 0;
    for (Size image = 0; image < s.images; ++image) whole += means[image * channels + c];
    whole /= double(s.images);
    for (Size image = 0; image < s.images; ++image) {
      const double step = means[image * channels + c] - whole;
      square += squares[image * channels + c] + step * step * double(pixels);
    }
    mean[c] = T(whole);
    rstd[c] = T(1 / std::sqrt(square / double(s.images * pixels) + eps));
  }
}

template <class X, class T, int K>
void forward(const Shape& s, const X* x, const Affine<T>& affine, T slope, X* y) {
  const Size right = s.channels, down = s.width * s.channels;
  const T *scale = affine.scale.data(), *shift = affine.shift.data();
  for_images(s, [&](Size begin, Size end) {
    for (Size image = begin; image < end; ++image)
      for (Size row = 0; row < s.rows(); ++row)
        for_windows(s, image, row, [&](Size at, Size result) {
          for_channels<T>(s.channels, [&](auto type, Size c) {
            using V = decltype(type);
            const Window<V, K> window(x + at + c, right, down, load<V>(scale + c), load<V>(shift + c));
            store(y + result + c, window.best < T(0) ? slope * window.best : window.best);
          });
        });
  });
}

// The sums of g, and of g times the normalised maxima, for each channel; g of inactive windows counts with the slope.
template <class X, class T, int K>
void sums(const Shape& s, const X* g, const X* x, const Affine<T>& affine, const T* mean, const T* rstd, T slope,
          T* of_normalised, T* of_g) {
  const Size channels = s.channels, right = channels, down = s.width * channels;
  const T *scale = affine.scale.data(), *shift = affine.shift.data();
  std::vector<double> totals(s.images * channels), products(s.images * channels);
  for_images(s, [&](Size begin, Size end) {
    std::vector<T> total(channels), product(channels);  // of a row
    for (Size image = begin; image < end; ++image)
      for (Size row = 0; row < s.rows(); ++row) {
        std::fill(total.begin(), total.end(), T(0));
        std::fill(product.begin(), product.end(), T(0));
        for_windows(s, image, row, [&](Size at, Size result) {
          for_channels<T>(channels, [&](auto type, Size c) {
            using V = decltype(type);
            const Window<V, K> window(x + at + c, right, down, load<V>(scale + c), load<V>(shift + c));
            const V given = load<V>(g + result + c);
            const V value = window.best > T(0) ? given : slope * given;
            const V centred = window.pick(x + at + c, right, down) - load<V>(mean + c);
            store(&total[c], load<V>(&total[c]) + value);
            store(&product[c], load<V>(&product[c]) + value * centred);
          });
        });
        for (Size c = 0; c < channels; ++c) {
          totals[image * channels + c] += double(total[c]);
          products[image * channels + c] += double(product[c]);
        }
      }
  });
  for (Size c = 0; c < channels; ++c) {
    double total = 0, product = 0;
    for (Size image = 0; image < s.images; ++image) {
      total += totals[image * channels + c];
      product += products[image * channels + c];
    }
    of_g[c] = T(total);
    of_normalised[c] = T(product * double(rstd[c]));
  }
}

// out = factor * (g at the maxima, 0 elsewhere) + constant + slant * v
template <class X, class T, int K>
void scatter(const Shape& s, const X* g, const X* x, const X* v, const Affine<T>& affine, T slope, const T* factor,
             const T* constant, const T* slant, X* out) {
  const Size channels = s.channels, right = channels, down = s.width * channels;
  const T *scale = affine.scale.data(), *shift = affine.shift.data();
  const auto fill = [&](Size begin, Size end) {  // pixels that are in no window
    for (Size at = begin * channels; at < end * channels; at += channels)
      for (Size c = 0; c < channels; ++c) store(out + at + c, constant[c] + slant[c] * load<T>(v + at + c));
  };
  for_images(s, [&](Size begin, Size end) {
    for (Size image = begin; image < end; ++image) {
      const Size first = image * s.height;
      for (Size row = 0; row < s.rows(); ++row) {
        for_windows(s, image, row, [&](Size at, Size result) {
          for_channels<T>(channels, [&](auto type, Size c) {
            using V = decltype(type);
            const Window<V, K> window(x + at + c, right, down, load<V>(scale + c), load<V>(shift + c));
            const V given = load<V>(g + result + c) * load<V>(factor + c);
            const V value = window.best > T(0) ? given : slope * given;
            window.place(out + at + c, v + at + c, right, down, value, load<V>(constant + c), load<V>(slant + c));
          });
        });
        for (Size k = row * K; k < (row + 1) * K; ++k)
          fill((first + k) * s.width + s.columns() * K, (first + k + 1) * s.width);
      }
      fill((first + s.rows() * K) * s.width, (first + s.height) * s.width);
    }
  });
}

// The gradients of x, weight and bias: scale * (G - sum G / n - x̂ * sum G x̂ / n) for G = g at the maxima, sum G x̂ and sum G.
template <class X, class T, int K>
void backward(const Shape& s, const X* g, const X* x, const Affine<T>& affine, const T* mean, const T* rstd, T slope,
              X* to_x, T* to_weight, T* to_bias) {
  sums<X, T, K>(s, g, x, affine, mean, rstd, slope, to_weight, to_bias);
  std::vector<T> constant(s.channels), slant(s.channels);
  const double n = double(s.images * s.pixels());
  for (Size c = 0; c < s.channels; ++c) {
    const double each = -double(affine.scale[c]) * double(rstd[c]) * double(to_weight[c]) / n;
    slant[c] = T(each);
    constant[c] = T(-double(affine.scale[c]) * double(to_bias[c]) / n - each * double(mean[c]));
  }
  scatter<X, T, K>(s, g, x, x, affine, slope, affine.scale.data(), constant.data(), slant.data(), to_x);
}

// out = (factor * v + constant + slant * x) at the maxima; with the slope in inactive windows
template <class X, class T, int K>
void gather(const Shape& s, const X* v, const X* x, const Affine<T>& affine, T slope, const T* factor, const T* constant,
            const T* slant, X* out) {
  const Size right = s.channels, down = s.width * s.channels;
  const T *scale = affine.scale.data(), *shift = affine.shift.data();
  for_images(s, [&](Size begin, Size end) {
    for (Size image = begin; image < end; ++image)
      for (Size row = 0; row < s.rows(); ++row)
        for_windows(s, image, row, [&](Size at, Size result) {
          for_channels<T>(s.channels, [&](auto type, Size c) {
            using V = decltype(type);
            const Window<V, K> window(x + at + c, right, down, load<V>(scale + c), load<V>(shift + c));
            const V value = load<V>(factor + c) * window.pick(v + at + c, right, down) + load<V>(constant + c) +
                            load<V>(slant + c) * window.pick(x + at + c, right, down);
            store(out + result + c, window.best > T(0) ? value : slope * value);
          });
        });
  });
}

Shape read(const Size* s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]}; }

}  // namespace

#define METAREG_BLOCKS(X, T, name)                                                                                      \
  void metareg_forward_##name(const Size* shape, double eps, double slope, const X* x, const T* weight, const T* bias,  \
                              X* y, T* mean, T* rstd) {                                                                 \
    const Shape s = read(shape);                                                                                        \
    Shape counted = s;                                                                                                  \
    counted.images = s.examples;                                                                                        \
    statistics(counted, x, eps, mean, rstd);                                                                            \
    const Affine<T> affine(s.channels, weight, bias, mean, rstd);                                                       \
    (s.window == 1 ? forward<X, T, 1> : forward<X, T, 2>)(s, x, affine, T(slope), y);                                   \
  }                                                                                                                     \
  void metareg_sums_##name(const Size* shape, double slope, const X* g, const X* x, const T* weight, const T* bias,     \
                           const T* mean, const T* rstd, T* of_normalised, T* of_g) {                                   \
    const Shape s = read(shape);                                                                                        \
    const Affine<T> affine(s.channels, weight, bias, mean, rstd);                                                       \
    (s.window == 1 ? sums<X, T, 1> : sums<X, T, 2>)(s, g, x, affine, mean, rstd, T(slope), of_normalised, of_g);        \
  }                                                                                                                     \
  void metareg_backward_##name(const Size* shape, double slope, const X* g, const X* x, const T* weight, const T* bias, \
                               const T* mean, const T* rstd, X* to_x, T* to_weight, T* to_bias) {                       \
    const Shape s = read(shape);                                                                                        \
    const Affine<T> affine(s.channels, weight, bias, mean, rstd);                                                       \
    (s.window == 1 ? backward<X, T, 1> : backward<X, T, 2>)(s, g, x, affine, mean, rstd, T(slope), to_x, to_weight,     \
                                                            to_bias);                                                   \
  }                                                                                                                     \
  void metareg_scatter_##name(const Size* shape, double slope, const X* g, const X* x, const X* v, const T* weight,     \
                              const T* bias, const T* mean, const T* rstd, const T* factor, const T* constant,          \
                              const T* slant, X* out) {                                                                 \
    const Shape s = read(shape);                                                                                        \
    const Affine<T> affine(s.channels, weight, bias, mean, rstd);                                                       \
    (s.window == 1 ? scatter<X, T, 1> : scatter<X, T, 2>)(s, g, x, v, affine, T(slope), factor, constant, slant, out);  \
  }                                                                                                                     \
  void metareg_gather_##name(const Size* shape, double slope, const X* v, const X* x, const T* weight, const T* bias,   \
                             const T* mean, const T* rstd, const T* factor, const T* constant, const T* slant,          \
                             X* out) {                                                                                  \
    const Shape s = read(shape);                                                                                        \
    const Affine<T> affine(s.channels, weight, bias, mean, rstd);                                                       \
    (s.window == 1 ? gather<X, T, 1> : gather<X, T, 2>)(s, v, x, affine, T(slope), factor, constant, slant, out);       \
  }

extern "C" {
METAREG_BLOCKS(float, float, float)
METAREG_BLOCKS(double, double, double)
METAREG_BLOCKS(Bfloat16, float, bfloat16)
}
