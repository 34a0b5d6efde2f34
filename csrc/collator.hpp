// Packed batches out of a flat buffer of token ids: rows are copied behind each other, with labels, positions, loss
// weights and boundaries, into buffers that the caller owns.
//
// Labels follow the convention that the loss compares the hidden state at t with the label at t + 1: the label at t is
// the id at t where it is supervised, else -100. A row's first label is always -100: in a pack the id before it belongs
// to another row.
// Cost: 2 bytes read and 24 written per id (uint16 ids; 28 with loss weights), so a copy of memory is the floor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace medmax {

// Which ids of a row are supervised. A row without eot counts whole under every policy.
enum class LabelPolicy {
    kFirstEot,  // those after the first eot
    kPerTurn,   // those after an odd number of eots, and the eot that ends them: every second turn, from the second on
    kAll,       // every one
};

// "first-eot", "per-turn" or "all"; std::invalid_argument for another name.
LabelPolicy label_policy(const std::string& name);

struct LabelRule {
    LabelPolicy policy;
    int64_t eot;
};

// Rows of a store: row r is ids[offsets[r]] .. ids[offsets[r + 1] - 1].
template <typename Id>
struct RowBuffer {
    const Id* ids;
    size_t num_ids;
    const int64_t* offsets;
    size_t num_rows;
};

// The rows of one pack, and the loss weight of each (null: no weights).
struct ChosenRows {
    const int64_t* rows;
    const float* weights;
    size_t count;
};

// The caller's buffers of `size` entries each; loss_weights may be null.
struct PackedBuffers {
    int64_t* input_ids;
    int64_t* labels;
    int64_t* position_ids;
    float* loss_weights;
    size_t size;
};

struct Boundaries {
    size_t sequences;
    int64_t longest;
};

// Fill cu_seqlens [entries] with the running length of the rows, each cut to max_length ids if that is > 0. If length
// is > 0 and the rows hold fewer ids, what is missing is one more sequence, of padding. Entries that are left repeat
// the last. Returns the number of sequences, empty ones at the end not counted, and the ids of the longest.
// Throws std::out_of_range for a row number or offsets outside the buffer, std::invalid_argument beyond `length` or
// 2^31 - 1 ids or more sequences than fit.
template <typename Id>
Boundaries pack_boundaries(const RowBuffer<Id>& store, const ChosenRows& chosen, int64_t max_length, int64_t length,
                           int32_t* cu_seqlens, size_t entries);

// Fill `out` from rows whose boundaries came from pack_boundaries; entries behind the last row become padding (`pad`,
// -100, position 0, weight 0). Returns the number of supervised labels. threads = 0 chooses by size.
template <typename Id>
int64_t fill_pack(const RowBuffer<Id>& store, const ChosenRows& chosen, const int32_t* cu_seqlens,
                  const LabelRule& rule, int64_t pad, int threads, const PackedBuffers& out);

// Supervised labels of each chosen row, as fill_pack would count them, into counts [chosen.count].
template <typename Id>
void count_targets(const RowBuffer<Id>& store, const ChosenRows& chosen, int64_t max_length, const LabelRule& rule,
                   int threads, int64_t* counts);

}  // namespace medmax
