#include "collator.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace medmax {
namespace {

constexpr int64_t kIgnored = -100;
// Below this many ids per thread, starting the thread costs more than it saves.
constexpr int64_t kIdsPerThread = 1 << 17;

// Ids of a row after the cut; every access to the buffer goes through this check.
template <typename Id>
int64_t row_length(const RowBuffer<Id>& store, int64_t row, int64_t max_length) {
    if (row < 0 || static_cast<size_t>(row) >= store.num_rows) {
        throw std::out_of_range("row " + std::to_string(row) + ", expected 0.." + std::to_string(store.num_rows) +
                                " (exclusive)");
    }
    const int64_t begin = store.offsets[row], end = store.offsets[row + 1];
    if (begin < 0 || end < begin || static_cast<size_t>(end) > store.num_ids) {
        throw std::out_of_range("row " + std::to_string(row) + " lies at " + std::to_string(begin) + ".." +
                                std::to_string(end) + ", expected inside 0.." + std::to_string(store.num_ids));
    }
    return max_length > 0 ? std::min(end - begin, max_length) : end - begin;
}

// Cores of the machine; asked once, because the answer costs more than a small pack.
int64_t cores() {
    static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
    return count;
}

// Number of leading labels to ignore. Blocks are tested as a whole first, which the compiler turns into vector code.
template <typename Id>
int64_t ignored_labels(const Id* ids, int64_t length, int64_t eot) {
    constexpr int64_t kBlock = 64;
    const Id wanted = static_cast<Id>(eot);
    int64_t i = 0;
    if (eot >= 0 && eot <= static_cast<int64_t>(std::numeric_limits<Id>::max())) {
        for (; i + kBlock <= length; i += kBlock) {
            Id found = 0;
            for (int64_t j = 0; j < kBlock; ++j) found |= static_cast<Id>(ids[i + j] == wanted);
            if (found) break;
        }
        for (; i < length; ++i) {
            if (ids[i] == wanted) return i + 1;
        }
    }
    return std::min<int64_t>(length, 1);
}

// Run work(begin, end) over items 0..count-1 in contiguous shares of about equal cost; `before(i)` is the cost of the
// items before i. `work` must not throw.
template <typename Before, typename Work>
void in_shares(size_t count, int threads, const Before& before, const Work& work) {
    const int64_t total = before(count);
    int64_t shares = threads;
    if (threads <= 0) {
        shares = std::min<int64_t>(cores(), 1 + total / kIdsPerThread);
    }
    shares = std::clamp<int64_t>(shares, 1, std::max<int64_t>(1, static_cast<int64_t>(count)));
    std::vector<std::thread> others;
    size_t begin = 0;
    for (int64_t share = 0; share < shares; ++share) {
        size_t end = begin;
        const int64_t limit = total / shares * (share + 1);
        while (end < count && before(end) < limit) ++end;
        if (share + 1 == shares) {
            work(begin, count);
        } else {
            // Where the system refuses another thread, this one does that share.
            try {
                others.emplace_back(work, begin, end);
            } catch (const std::system_error&) {
                work(begin, end);
            }
        }
        begin = end;
    }
    for (auto& thread : others) thread.join();
}

template <typename Id>
void fill_row(const Id* ids, int64_t length, int64_t ignored, int64_t* input_ids, int64_t* labels,
              int64_t* position_ids) {
    for (int64_t i = 0; i < length; ++i) input_ids[i] = ids[i];
    std::fill(labels, labels + ignored, kIgnored);
    for (int64_t i = ignored; i < length; ++i) labels[i] = ids[i];
    std::iota(position_ids, position_ids + length, int64_t{0});
}

}  // namespace

template <typename Id>
void pack_boundaries(const RowBuffer<Id>& store, const int64_t* rows, size_t count, int64_t max_length,
                     int32_t* cu_seqlens) {
    int64_t total = 0;
    cu_seqlens[0] = 0;
    for (size_t i = 0; i < count; ++i) {
        total += row_length(store, rows[i], max_length);
        if (total > std::numeric_limits<int32_t>::max()) {
            throw std::invalid_argument("a pack of more than 2^31 - 1 ids");
        }
        cu_seqlens[i + 1] = static_cast<int32_t>(total);
    }
}

template <typename Id>
int64_t fill_pack(const RowBuffer<Id>& store, const int64_t* rows, size_t count, const int32_t* cu_seqlens,
                  int64_t eot, int threads, const PackedBuffers& out) {
    for (size_t i = 0; i < count; ++i) {
        const int64_t length = int64_t{cu_seqlens[i + 1]} - cu_seqlens[i];
        if (length < 0 || length > row_length(store, rows[i], 0)) {
            throw std::invalid_argument("cu_seqlens do not belong to these rows");
        }
    }
    std::vector<int64_t> targets(count);
    in_shares(
        count, threads, [&](size_t i) { return int64_t{cu_seqlens[i]}; },
        [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                const Id* ids = store.ids + store.offsets[rows[i]];
                const int64_t at = cu_seqlens[i], length = cu_seqlens[i + 1] - at;
                const int64_t ignored = ignored_labels(ids, length, eot);
                fill_row(ids, length, ignored, out.input_ids + at, out.labels + at, out.position_ids + at);
                targets[i] = length - ignored;
            }
        });
    return std::accumulate(targets.begin(), targets.end(), int64_t{0});
}

template <typename Id>
void count_targets(const RowBuffer<Id>& store, const int64_t* rows, size_t count, int64_t max_length, int64_t eot,
                   int threads, int64_t* counts) {
    std::vector<int64_t> before(count + 1, 0);
    for (size_t i = 0; i < count; ++i) before[i + 1] = before[i] + row_length(store, rows[i], max_length);
    in_shares(
        count, threads, [&](size_t i) { return before[i]; },
        [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                const int64_t length = before[i + 1] - before[i];
                counts[i] = length - ignored_labels(store.ids + store.offsets[rows[i]], length, eot);
            }
        });
}

// The two widths that a token store can have.
#define MEDMAX_FOR_ID(Id)                                                                                           \
    template void pack_boundaries(const RowBuffer<Id>&, const int64_t*, size_t, int64_t, int32_t*);                 \
    template int64_t fill_pack(const RowBuffer<Id>&, const int64_t*, size_t, const int32_t*, int64_t, int,          \
                               const PackedBuffers&);                                                               \
    template void count_targets(const RowBuffer<Id>&, const int64_t*, size_t, int64_t, int64_t, int, int64_t*);
MEDMAX_FOR_ID(uint16_t)
MEDMAX_FOR_ID(uint32_t)
#undef MEDMAX_FOR_ID

}  // namespace medmax
