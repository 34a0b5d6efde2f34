// Pillow's LANCZOS resize of an RGB image, to the bit, for the pixels that a crop keeps.
//
// Two passes of integer convolutions, rows first, with uint8 between them. A weight is
// sinc(x) sinc(x / 3) at the distance x from the output pixel's centre (in output pixels where the image shrinks),
// normalised in double precision over the taps and rounded half away from zero to 22 fractional bits; a pixel is
// (sum + 2^21) >> 22, clamped to 0..255 (Pillow, src/libImaging/Resample.c).
// Cost for w x h to 512 x 512: 3 (512 h taps_x + 512^2 taps_y) products; on AVX2 sixteen of them are two instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace medmax {

// Filter of `count` neighbouring output pixels along one axis: output i is the sum over t of
// weights[i * taps + t] * input[starts[i] + t]. Rows are padded with zero weights to the longest one; with the padding
// a row may reach beyond the image, never its non-zero weights.
struct Filter {
    int64_t taps = 0;
    std::vector<int32_t> starts, weights;
};

// Pixels of `channels` bytes (3, or 4 with the last one ignored), rows end to end.
struct Picture {
    const uint8_t* pixels;
    int64_t height, width;
    int channels;
};

// What to compute: the window of height x width pixels at (top, left) of the picture resized to full_height x full_width.
struct Window {
    int64_t full_height, full_width, top, left, height, width;
};

// Filter for output pixels first .. first + count - 1 when `in` pixels become `out`.
// Throws std::invalid_argument for sizes below one or a range outside 0..out.
Filter lanczos_filter(int64_t in, int64_t out, int64_t first, int64_t count);

// Write the window as uint8 [height, width, 3]. threads >= 1; vectorised where the processor has AVX2, unless `plain`.
// Throws std::invalid_argument as lanczos_filter does.
void resample(const Picture& picture, const Window& window, int threads, bool plain, uint8_t* out);

// Whether this processor runs the AVX2 form.
bool has_avx2();

}  // namespace medmax
