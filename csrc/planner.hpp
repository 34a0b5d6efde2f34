// Packing plan of one epoch: which rows share a pack, and in which order the packs come.
//
// Best-fit decreasing: rows, longest first, go into the open pack with the least room that still holds them. The
// packs' free rooms are the set bits of a tree of 64-bit words (a segment tree with 64 children per node), so that
// "least room >= length" costs log64(capacity) word operations (with two children per node the whole plan takes 1.4 to
// 2 times as long), and the plan O(n log capacity) time and about 20 bytes a row. Order comes from (seed, epoch) alone: rows are shuffled before the sort, which makes ties in length
// random, and packs are shuffled after it, so that lengths do not show in the order of training.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace medmax {

// Largest pack; one list head per possible room is held in memory.
constexpr int64_t kMaxCapacity = int64_t{1} << 24;

struct Plan {
    // Row numbers, pack by pack.
    std::vector<int64_t> rows;
    // Pack p is rows[offsets[p]] .. rows[offsets[p + 1] - 1].
    std::vector<int64_t> offsets;
};

// Plan `count` rows of `lengths` ids into packs of `capacity` ids. Rows with no ids or with more than `capacity` are
// left out. Throws std::invalid_argument on a negative length, a capacity outside 1..kMaxCapacity, or 2^32 rows.
Plan plan_packs(const int64_t* lengths, size_t count, int64_t capacity, uint64_t seed, uint64_t epoch);

}  // namespace medmax
