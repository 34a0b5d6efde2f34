// Packed batches out of a flat buffer of token ids: rows are copied behind each other, with labels, positions and
// boundaries, into buffers that the caller owns.
//
// Labels follow the convention that the loss compares the hidden state at t with the label at t + 1: the label at t is
// the id at t, or -100 up to and including the row's first eot. A row without eot counts whole, except that a row's
// first label is always -100: in a pack the id before it belongs to another row.
// Cost: 2 bytes read and 24 written per id (uint16 ids), so a copy of memory is the floor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medmax {

// Rows of a store: row r is ids[offsets[r]] .. ids[offsets[r + 1] - 1].
template <typename Id>
struct RowBuffer {
    const Id* ids;
    size_t num_ids;
    const int64_t* offsets;
    size_t num_rows;
};

// The caller's buffers: three of cu_seqlens[count] entries.
struct PackedBuffers {
    int64_t* input_ids;
    int64_t* labels;
    int64_t* position_ids;
};

// Fill cu_seqlens [count + 1] with the running length of the chosen rows, each cut to max_length ids if that is > 0.
// Throws std::out_of_range for a row number or offsets outside the buffer, std::invalid_argument beyond 2^31 - 1 ids.
template <typename Id>
void pack_boundaries(const RowBuffer<Id>& store, const int64_t* rows, size_t count, int64_t max_length,
                     int32_t* cu_seqlens);

// Fill `out` from rows whose boundaries came from pack_boundaries; returns the number of supervised labels.
// threads = 0 chooses by size.
template <typename Id>
int64_t fill_pack(const RowBuffer<Id>& store, const int64_t* rows, size_t count, const int32_t* cu_seqlens,
                  int64_t eot, int threads, const PackedBuffers& out);

// Supervised labels of each chosen row, as fill_pack would count them, into counts [count].
template <typename Id>
void count_targets(const RowBuffer<Id>& store, const int64_t* rows, size_t count, int64_t max_length, int64_t eot,
                   int threads, int64_t* counts);

}  // namespace medmax
