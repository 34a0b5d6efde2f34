#include "expand.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

namespace medmax {
namespace {

// Below this many ids per thread, starting the thread costs more than it saves.
constexpr int64_t kIdsPerThread = 1 << 17;

// Offsets [count + 1] that rise within 0..size, or an exception; everything after this may index freely.
void check_offsets(const int64_t* offsets, size_t count, size_t size, const char* name) {
    for (size_t i = 0; i <= count; ++i) {
        const int64_t before = i ? offsets[i - 1] : 0;
        if (offsets[i] < before || offsets[i] > static_cast<int64_t>(size)) {
            throw std::out_of_range(std::string(name) + " offset " + std::to_string(offsets[i]) + " at " +
                                    std::to_string(i) + ", expected " + std::to_string(before) + ".." +
                                    std::to_string(size));
        }
    }
}

// Run work(begin, end) over rows 0..count-1 in contiguous shares of about equal cost(row); `work` must not throw.
template <typename Cost, typename Work>
void in_shares(size_t count, int threads, const Cost& cost, const Work& work) {
    int64_t total = 0;
    for (size_t i = 0; i < count; ++i) total += cost(i);
    int64_t shares = threads;
    if (threads <= 0) {
        const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
        shares = std::min<int64_t>(cores, 1 + total / kIdsPerThread);
    }
    shares = std::clamp<int64_t>(shares, 1, std::max<int64_t>(1, static_cast<int64_t>(count)));
    std::vector<std::thread> others;
    size_t begin = 0;
    int64_t before = 0;
    for (int64_t share = 0; share + 1 < shares; ++share) {
        size_t end = begin;
        while (end < count && before < total / shares * (share + 1)) before += cost(end++);
        // Where the system refuses another thread, this one does that share.
        try {
            others.emplace_back(work, begin, end);
        } catch (const std::system_error&) {
            work(begin, end);
        }
        begin = end;
    }
    work(begin, count);
    for (auto& thread : others) thread.join();
}

const uint16_t* codes_of(const std::vector<CodeBlock>& blocks, int64_t image) {
    for (const CodeBlock& block : blocks) {
        if (image < block.images) return block.codes + image * kImageCodes;
        image -= block.images;
    }
    return nullptr;
}

void check_images(const ImageRows& images) {
    int64_t total = 0;
    for (const CodeBlock& block : images.blocks) total += block.images;
    for (size_t i = 0; i < images.num_which; ++i) {
        if (images.which[i] < 0 || images.which[i] >= total) {
            throw std::out_of_range("image " + std::to_string(images.which[i]) + ", expected 0.." +
                                    std::to_string(total) + " (exclusive)");
        }
    }
}

// Ids are compared as unsigned, so that a negative one is above every limit.
template <typename Text>
uint64_t as_unsigned(Text id) {
    return static_cast<uint64_t>(static_cast<int64_t>(id));
}

struct Finding {
    RowProblem kind;
    int64_t value;
    int64_t length;
};

// First id of a row that is outside the vocabulary, or `length`. The common answer is found by the maximum of a block,
// which the compiler turns into vector code.
template <typename Text>
int64_t first_outside(const Text* ids, int64_t length, uint64_t vocab_size) {
    constexpr int64_t kBlock = 64;
    using Unsigned = std::make_unsigned_t<Text>;
    // Where every value of the type is in the vocabulary (65,536 ids as uint16), there is nothing to look for.
    if (vocab_size > std::numeric_limits<Unsigned>::max()) return length;
    const auto limit = static_cast<Unsigned>(vocab_size);
    int64_t i = 0;
    for (; i + kBlock <= length; i += kBlock) {
        Unsigned bad = 0;
        for (int64_t j = 0; j < kBlock; ++j) bad |= static_cast<Unsigned>(static_cast<Unsigned>(ids[i + j]) >= limit);
        if (bad) break;
    }
    while (i < length && static_cast<Unsigned>(ids[i]) < limit) ++i;
    return i;
}

template <typename Text>
Finding measure_text(const Text* ids, int64_t length, const int64_t* which, int64_t images,
                     const std::vector<CodeBlock>& blocks, const SpecialIds& special) {
    const auto placeholder = as_unsigned(special.placeholder);
    const auto first = as_unsigned(special.image_start), last = as_unsigned(special.boi);
    int64_t placeholders = 0, spelled = -1;
    for (int64_t i = 0; i < length; ++i) {
        const uint64_t id = as_unsigned(ids[i]);
        placeholders += id == placeholder;
        if (spelled < 0 && id >= first && id <= last) spelled = i;
    }
    if (placeholders != images) return {kImageCount, placeholders, 0};
    if (spelled >= 0) return {kImageId, static_cast<int64_t>(ids[spelled]), 0};
    for (int64_t k = 0; k < images; ++k) {
        const uint16_t* codes = codes_of(blocks, which[k]);
        const uint16_t largest = *std::max_element(codes, codes + kImageCodes);
        if (largest < special.num_codes) continue;
        const uint16_t* bad = std::find_if(codes, codes + kImageCodes,
                                           [&](uint16_t code) { return code >= special.num_codes; });
        return {kCode, int64_t{*bad}, 0};
    }
    return {kFine, 0, 2 + length + images * (kImageCodes + 1)};
}

template <typename Text, typename Id>
Id* put(const Text* ids, int64_t length, Id* out) {
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<Id>(ids[i]);
    return out + length;
}

template <typename Id>
Id* put_image(const uint16_t* codes, const SpecialIds& special, Id* out) {
    const auto start = static_cast<Id>(special.image_start);
    *out++ = static_cast<Id>(special.boi);
    for (int64_t i = 0; i < kImageCodes; ++i) out[i] = static_cast<Id>(codes[i] + start);
    out += kImageCodes;
    *out++ = static_cast<Id>(special.eoi);
    return out;
}

}  // namespace

template <typename Text>
void measure_rows(const TextRows<Text>& rows, const ImageRows& images, const SpecialIds& special, int threads,
                  int64_t* out_offsets, uint8_t* kinds, int64_t* values) {
    check_offsets(rows.offsets, rows.count, rows.num_ids, "text");
    check_offsets(images.offsets, rows.count, images.num_which, "image");
    check_images(images);
    const auto cost = [&](size_t i) {
        return rows.offsets[i + 1] - rows.offsets[i] +
               kImageCodes * (images.offsets[i + 1] - images.offsets[i]);
    };
    const auto work = [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const Text* ids = rows.ids + rows.offsets[i];
            const int64_t length = rows.offsets[i + 1] - rows.offsets[i];
            const int64_t bad = first_outside(ids, length, static_cast<uint64_t>(special.vocab_size));
            Finding found{kFine, 0, length};
            if (bad < length) {
                found = {kOutside, static_cast<int64_t>(ids[bad]), 0};
            } else if (!rows.ready[i]) {
                found = measure_text(ids, length, images.which + images.offsets[i],
                                     images.offsets[i + 1] - images.offsets[i], images.blocks, special);
            }
            kinds[i] = found.kind;
            values[i] = found.value;
            out_offsets[i + 1] = found.length;
        }
    };
    in_shares(rows.count, threads, cost, work);
    out_offsets[0] = 0;
    for (size_t i = 0; i < rows.count; ++i) out_offsets[i + 1] += out_offsets[i];
}

template <typename Text, typename Id>
void write_rows(const TextRows<Text>& rows, const ImageRows& images, const SpecialIds& special, int threads,
                const int64_t* out_offsets, Id* ids) {
    const auto cost = [&](size_t i) { return out_offsets[i + 1] - out_offsets[i]; };
    const auto work = [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            if (!cost(i)) continue;
            const Text *text = rows.ids + rows.offsets[i], *stop = rows.ids + rows.offsets[i + 1];
            Id* out = ids + out_offsets[i];
            if (rows.ready[i]) {
                put(text, stop - text, out);
                continue;
            }
            const int64_t* image = images.which + images.offsets[i];
            *out++ = static_cast<Id>(special.bos);
            while (true) {
                const Text* place = std::find(text, stop, special.placeholder);
                out = put(text, place - text, out);
                if (place == stop) break;
                out = put_image(codes_of(images.blocks, *image++), special, out);
                text = place + 1;
            }
            *out = static_cast<Id>(special.eos);
        }
    };
    in_shares(rows.count, threads, cost, work);
}

// The integers that text comes in, and the two widths that a token store can have.
#define MEDMAX_FOR_TEXT(Text)                                                                                      \
    template void measure_rows(const TextRows<Text>&, const ImageRows&, const SpecialIds&, int, int64_t*, uint8_t*, \
                               int64_t*);                                                                          \
    template void write_rows(const TextRows<Text>&, const ImageRows&, const SpecialIds&, int, const int64_t*,      \
                             uint16_t*);                                                                           \
    template void write_rows(const TextRows<Text>&, const ImageRows&, const SpecialIds&, int, const int64_t*,      \
                             uint32_t*);
MEDMAX_FOR_TEXT(int32_t)
MEDMAX_FOR_TEXT(int64_t)
MEDMAX_FOR_TEXT(uint16_t)
MEDMAX_FOR_TEXT(uint32_t)
#undef MEDMAX_FOR_TEXT

}  // namespace medmax
