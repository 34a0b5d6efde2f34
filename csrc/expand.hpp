// Rows of encoded text and images as vocabulary ids: bos, the text with each placeholder replaced by boi, the ids of
// one image's codes and eoi, then eos; and rows that are ids already, which are checked and copied.
//
// One call takes all rows of a batch out of flat buffers (a tokenizer's ids joined, an Arrow list column, a
// memory-mapped table of codes) without copying them first. A bad row becomes an entry in `kinds` and `values` and has
// no ids; the others are written all the same.
// Cost: text is read twice and codes are read twice (checked, then written); 2 or 4 bytes are written per id.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace medmax {

constexpr int64_t kImageCodes = 1024;

// What is wrong with a row, with the value that says it best.
enum RowProblem : uint8_t {
    kFine = 0,
    kImageCount = 1,   // value: placeholders in the text
    kImageId = 2,      // value: an id in the text that only an image may hold
    kCode = 3,         // value: a code outside the codebook
    kOutside = 4,      // value: an id outside the vocabulary
};

struct SpecialIds {
    int64_t bos, eos, image_start, num_codes, eoi, boi, placeholder, vocab_size;
};

// Row r is ids[offsets[r]] .. ids[offsets[r + 1] - 1]; where ready[r] is set it is a finished sequence.
template <typename Text>
struct TextRows {
    const Text* ids;
    size_t num_ids;
    const int64_t* offsets;
    const uint8_t* ready;
    size_t count;
};

struct CodeBlock {
    const uint16_t* codes;
    int64_t images;
};

// Image j of row r is number which[offsets[r] + j], counted through the blocks of 1024 codes per image.
struct ImageRows {
    std::vector<CodeBlock> blocks;
    const int64_t* which;
    size_t num_which;
    const int64_t* offsets;
};

// Where rows end: out_offsets [count + 1]; a row with a problem (kinds [count], values [count]) takes no ids.
// threads = 0 chooses by size. Throws std::out_of_range for offsets or image numbers outside their buffers.
template <typename Text>
void measure_rows(const TextRows<Text>& rows, const ImageRows& images, const SpecialIds& special, int threads,
                  int64_t* out_offsets, uint8_t* kinds, int64_t* values);

// Write the ids of rows that measure_rows has measured: ids [out_offsets[count]].
template <typename Text, typename Id>
void write_rows(const TextRows<Text>& rows, const ImageRows& images, const SpecialIds& special, int threads,
                const int64_t* out_offsets, Id* ids);

}  // namespace medmax
