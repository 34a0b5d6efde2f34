#include "resample.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace medmax {
namespace {

constexpr double kLobes = 3.0;
constexpr int kFraction = 22;
constexpr int32_t kHalf = 1 << (kFraction - 1);
// A weight w is (w >> kLowBits) * 2^kLowBits + (w & kLowMask): both parts fit the 16-bit operands of a multiply-add.
constexpr int kLowBits = 11;
constexpr int32_t kLowMask = (1 << kLowBits) - 1;
// Room behind each row between the passes, for vector loads and stores that run over its end.
constexpr int64_t kPadding = 64;
// Filters kept per thread: computing one takes thousands of sines, and collections repeat their sizes.
constexpr size_t kCachedFilters = 64;

double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= M_PI;
    return std::sin(x) / x;
}

double lanczos(double x) { return -kLobes <= x && x < kLobes ? sinc(x) * sinc(x / kLobes) : 0.0; }

uint8_t to_byte(int32_t sum) { return static_cast<uint8_t>(std::clamp((sum + kHalf) >> kFraction, 0, 255)); }

// Both passes over one picture. Between them lie the rows [first_row, first_row + rows) of the picture, already
// narrowed to the window's columns: packed RGB with `pitch` bytes a row.
struct Passes {
    const Picture& picture;
    const Window& window;
    const Filter &across, &down;
    int64_t first_row, rows, pitch;
    uint8_t* narrowed;
};

Filter cached_filter(int64_t in, int64_t out, int64_t first, int64_t count) {
    thread_local std::map<std::array<int64_t, 4>, Filter> cache;
    const std::array<int64_t, 4> key{in, out, first, count};
    auto found = cache.find(key);
    if (found != cache.end()) return found->second;
    Filter filter = lanczos_filter(in, out, first, count);
    if (cache.size() >= kCachedFilters) cache.clear();
    return cache.emplace(key, std::move(filter)).first->second;
}

// Row y of the picture as the horizontal pass may read it: vector loads run beyond the end of a row, which is harmless
// except behind the picture's last one.
const uint8_t* row_or_copy(const Picture& picture, int64_t y, int64_t overrun, std::vector<uint8_t>& scratch) {
    const int64_t bytes = picture.width * picture.channels;
    const uint8_t* row = picture.pixels + y * bytes;
    if ((picture.height - 1 - y) * bytes >= overrun) return row;
    scratch.assign(static_cast<size_t>(bytes + overrun), 0);
    std::memcpy(scratch.data(), row, static_cast<size_t>(bytes));
    return scratch.data();
}

void narrow_plain(Passes& p, int64_t begin, int64_t end) {
    const int channels = p.picture.channels;
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* row = p.picture.pixels + (p.first_row + r) * p.picture.width * channels;
        uint8_t* out = p.narrowed + r * p.pitch;
        for (int64_t x = 0; x < p.window.width; ++x) {
            const int32_t* weights = p.across.weights.data() + x * p.across.taps;
            const int64_t start = p.across.starts[x], taps = std::min(p.across.taps, p.picture.width - start);
            int32_t sum[3] = {0, 0, 0};
            for (int64_t t = 0; t < taps; ++t) {
                for (int c = 0; c < 3; ++c) sum[c] += weights[t] * row[(start + t) * channels + c];
            }
            for (int c = 0; c < 3; ++c) out[3 * x + c] = to_byte(sum[c]);
        }
    }
}

void shorten_plain(Passes& p, int64_t begin, int64_t end, uint8_t* out) {
    for (int64_t y = begin; y < end; ++y) {
        const int32_t* weights = p.down.weights.data() + y * p.down.taps;
        const int64_t start = p.down.starts[y] - p.first_row, taps = std::min(p.down.taps, p.rows - start);
        const uint8_t* rows = p.narrowed + start * p.pitch;
        for (int64_t i = 0; i < 3 * p.window.width; ++i) {
            int32_t sum = 0;
            for (int64_t t = 0; t < taps; ++t) sum += weights[t] * rows[t * p.pitch + i];
            out[y * 3 * p.window.width + i] = to_byte(sum);
        }
    }
}

#if defined(__x86_64__)

// Weights of one output pixel in steps of four taps, high and low halves apart: [count][steps][4] each.
struct SplitWeights {
    int64_t steps;
    std::vector<int16_t> high, low;
};

SplitWeights split(const Filter& filter, int64_t group) {
    const int64_t count = static_cast<int64_t>(filter.starts.size());
    SplitWeights w{(filter.taps + group - 1) / group, {}, {}};
    w.high.assign(static_cast<size_t>(count * w.steps * group), 0);
    w.low = w.high;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t t = 0; t < filter.taps; ++t) {
            const int32_t weight = filter.weights[i * filter.taps + t];
            w.high[i * w.steps * group + t] = static_cast<int16_t>(weight >> kLowBits);
            w.low[i * w.steps * group + t] = static_cast<int16_t>(weight & kLowMask);
        }
    }
    return w;
}

#define MEDMAX_AVX2 __attribute__((target("avx2")))

// Sums of high and low halves to pixel values, not yet clamped.
MEDMAX_AVX2 inline __m256i finish(__m256i high, __m256i low) {
    const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high, kLowBits), low);
    return _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(kHalf)), kFraction);
}

// kRows rows at a time share the loads of the weights. A step takes four pixels: a shuffle makes 16-bit pairs
// (pixel 0, pixel 1) per channel in the lower half of a register and (pixel 2, pixel 3) in the upper one.
template <int kRows>
MEDMAX_AVX2 void narrow_rows(const Passes& p, const SplitWeights& w, const uint8_t* const* in, uint8_t* const* out) {
    const int channels = p.picture.channels;
    const __m256i pick = channels == 4
                             ? _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, -1, -1, -1, -1,  //
                                                8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, -1, -1, -1, -1)
                             : _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                                6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int64_t x = 0; x < p.window.width; ++x) {
        __m256i high[kRows], low[kRows];
        for (int r = 0; r < kRows; ++r) high[r] = low[r] = _mm256_setzero_si256();
        const int16_t* wh = w.high.data() + x * w.steps * 4;
        const int16_t* wl = w.low.data() + x * w.steps * 4;
        int64_t at = static_cast<int64_t>(p.across.starts[x]) * channels;
        for (int64_t s = 0; s < w.steps; ++s, at += 4 * channels) {
            const __m128i h4 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(wh + 4 * s));
            const __m128i l4 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(wl + 4 * s));
            const __m256i h = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(h4), spread);
            const __m256i l = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(l4), spread);
            for (int r = 0; r < kRows; ++r) {
                const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[r] + at));
                const __m256i pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), pick);
                high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(pairs, h));
                low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(pairs, l));
            }
        }
        for (int r = 0; r < kRows; ++r) {
            // Each half of a register holds part of the sum: add them before rounding.
            const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[r], kLowBits), low[r]);
            __m128i value = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
            value = _mm_srai_epi32(_mm_add_epi32(value, _mm_set1_epi32(kHalf)), kFraction);
            value = _mm_packus_epi16(_mm_packs_epi32(value, value), value);
            const int32_t rgb = _mm_cvtsi128_si32(value);
            // The fourth byte is overwritten by the next pixel, or lies in the padding.
            std::memcpy(out[r] + 3 * x, &rgb, 4);
        }
    }
}

void narrow_avx2(Passes& p, const SplitWeights& w, int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch;
    const int64_t bytes = p.picture.width * p.picture.channels;
    // From its last pixel a row may be read for all taps of a filter, and a whole load from there.
    const int64_t overrun = 4 * w.steps * p.picture.channels + 16;
    int64_t r = begin;
    for (; r + 4 <= end && (p.picture.height - 1 - (p.first_row + r + 3)) * bytes >= overrun; r += 4) {
        const uint8_t* in[4];
        uint8_t* out[4];
        for (int i = 0; i < 4; ++i) {
            in[i] = p.picture.pixels + (p.first_row + r + i) * bytes;
            out[i] = p.narrowed + (r + i) * p.pitch;
        }
        narrow_rows<4>(p, w, in, out);
    }
    for (; r < end; ++r) {
        const uint8_t* in = row_or_copy(p.picture, p.first_row + r, overrun, scratch);
        uint8_t* out = p.narrowed + r * p.pitch;
        narrow_rows<1>(p, w, &in, &out);
    }
}

// Thirty-two bytes of a row at a time, two taps at once: (row t, row t + 1) as 16-bit pairs.
MEDMAX_AVX2 void shorten_avx2(const Passes& p, const SplitWeights& w, int64_t begin, int64_t end, uint8_t* out) {
    const int64_t bytes = 3 * p.window.width;
    for (int64_t y = begin; y < end; ++y) {
        const uint8_t* rows = p.narrowed + (p.down.starts[y] - p.first_row) * p.pitch;
        const int16_t* wh = w.high.data() + y * w.steps * 2;
        const int16_t* wl = w.low.data() + y * w.steps * 2;
        for (int64_t i = 0; i < bytes; i += 32) {
            __m256i high[4], low[4];
            for (int q = 0; q < 4; ++q) high[q] = low[q] = _mm256_setzero_si256();
            for (int64_t s = 0; s < w.steps; ++s) {
                int32_t pair_h, pair_l;
                std::memcpy(&pair_h, wh + 2 * s, 4);
                std::memcpy(&pair_l, wl + 2 * s, 4);
                const __m256i h = _mm256_set1_epi32(pair_h), l = _mm256_set1_epi32(pair_l);
                const uint8_t* a = rows + 2 * s * p.pitch + i;
                for (int half = 0; half < 2; ++half) {
                    const __m128i top = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 16 * half));
                    const __m128i below = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + p.pitch + 16 * half));
                    const __m256i left = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(top, below));
                    const __m256i right = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(top, below));
                    high[2 * half] = _mm256_add_epi32(high[2 * half], _mm256_madd_epi16(left, h));
                    low[2 * half] = _mm256_add_epi32(low[2 * half], _mm256_madd_epi16(left, l));
                    high[2 * half + 1] = _mm256_add_epi32(high[2 * half + 1], _mm256_madd_epi16(right, h));
                    low[2 * half + 1] = _mm256_add_epi32(low[2 * half + 1], _mm256_madd_epi16(right, l));
                }
            }
            // Packing works within halves of registers; the permutation puts the bytes back in order.
            const __m256i first = _mm256_packs_epi32(finish(high[0], low[0]), finish(high[1], low[1]));
            const __m256i second = _mm256_packs_epi32(finish(high[2], low[2]), finish(high[3], low[3]));
            const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second),
                                                               _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            uint8_t* target = out + y * bytes + i;
            if (i + 32 <= bytes) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), packed);
            } else {
                uint8_t tail[32];
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(tail), packed);
                std::memcpy(target, tail, static_cast<size_t>(bytes - i));
            }
        }
    }
}

#endif

// Run work(begin, end) over 0..count-1 in equal shares. `work` must not throw.
template <typename Work>
void in_threads(int64_t count, int threads, const Work& work) {
    const int64_t shares = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
    std::vector<std::thread> others;
    int64_t begin = 0;
    for (int64_t s = 1; s < shares; ++s) {
        const int64_t end = count * s / shares;
        try {
            others.emplace_back(work, begin, end);
        } catch (const std::system_error&) {
            // No more threads to be had: this one does what is left.
            break;
        }
        begin = end;
    }
    work(begin, count);
    for (auto& thread : others) thread.join();
}

}  // namespace

Filter lanczos_filter(int64_t in, int64_t out, int64_t first, int64_t count) {
    if (in < 1 || out < 1 || first < 0 || count < 0 || count > out - first ||
        std::max(in, out) > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("pixels " + std::to_string(first) + " and " + std::to_string(count) +
                                    " on of a size " + std::to_string(in) + " made " + std::to_string(out) +
                                    ", expected positive sizes and a range inside the output");
    }
    const double scale = static_cast<double>(in) / static_cast<double>(out);
    const double stretch = std::max(scale, 1.0), support = kLobes * stretch, step = 1.0 / stretch;
    Filter filter;
    filter.starts.resize(static_cast<size_t>(count));
    std::vector<std::vector<int32_t>> rows(static_cast<size_t>(count));
    std::vector<double> exact;
    for (int64_t i = 0; i < count; ++i) {
        const double centre = (static_cast<double>(first + i) + 0.5) * scale;
        const auto low = static_cast<int64_t>(std::max(centre - support + 0.5, 0.0));
        const auto high = std::min(static_cast<int64_t>(centre + support + 0.5), in);
        exact.clear();
        double total = 0.0;
        for (int64_t x = low; x < high; ++x) {
            exact.push_back(lanczos((static_cast<double>(x) - centre + 0.5) * step));
            total += exact.back();
        }
        auto& row = rows[static_cast<size_t>(i)];
        for (double weight : exact) {
            if (total != 0.0) weight /= total;
            weight *= 1 << kFraction;
            row.push_back(static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5));
        }
        // Zeros at the ends are left out: a picture that keeps its size has one tap.
        while (row.size() > 1 && row.back() == 0) row.pop_back();
        const auto lead = std::find_if(row.begin(), row.end() - 1, [](int32_t w) { return w != 0; }) - row.begin();
        row.erase(row.begin(), row.begin() + lead);
        filter.starts[static_cast<size_t>(i)] = static_cast<int32_t>(low + lead);
        filter.taps = std::max(filter.taps, static_cast<int64_t>(row.size()));
    }
    filter.weights.assign(static_cast<size_t>(count * filter.taps), 0);
    for (int64_t i = 0; i < count; ++i) {
        const auto& row = rows[static_cast<size_t>(i)];
        std::copy(row.begin(), row.end(), filter.weights.begin() + i * filter.taps);
    }
    return filter;
}

void resample(const Picture& picture, const Window& window, int threads, bool plain, uint8_t* out) {
    const Filter across = cached_filter(picture.width, window.full_width, window.left, window.width);
    const Filter down = cached_filter(picture.height, window.full_height, window.top, window.height);
    if (window.height == 0 || window.width == 0) return;
    // Starts may step back by a tap, since zeros are left out.
    const auto [lowest, highest] = std::minmax_element(down.starts.begin(), down.starts.end());
    const int64_t first_row = *lowest, rows = std::min<int64_t>(*highest + down.taps, picture.height) - first_row;
    const int64_t pitch = 3 * window.width + kPadding;
    // Kept from picture to picture. Padded taps read rows beyond the last one: whatever is there, times zero.
    thread_local std::vector<uint8_t> buffer;
    const auto needed = static_cast<size_t>((rows + down.taps + 2) * pitch);
    if (buffer.size() < needed) buffer.resize(needed);
    Passes p{picture, window, across, down, first_row, rows, pitch, buffer.data()};
#if defined(__x86_64__)
    if (!plain && has_avx2()) {
        const SplitWeights columns = split(across, 4), lines = split(down, 2);
        in_threads(p.rows, threads, [&](int64_t begin, int64_t end) { narrow_avx2(p, columns, begin, end); });
        in_threads(window.height, threads,
                   [&](int64_t begin, int64_t end) { shorten_avx2(p, lines, begin, end, out); });
        return;
    }
#endif
    in_threads(p.rows, threads, [&](int64_t begin, int64_t end) { narrow_plain(p, begin, end); });
    in_threads(window.height, threads, [&](int64_t begin, int64_t end) { shorten_plain(p, begin, end, out); });
}

bool has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

}  // namespace medmax
