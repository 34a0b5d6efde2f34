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
constexpr int64_t kMostIds = std::numeric_limits<int32_t>::max();
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

// Index of the first eot at or after `i`, `length` if there is none. Blocks are tested as a whole first, which the
// compiler turns into vector code.
template <typename Id>
int64_t find_eot(const Id* ids, int64_t i, int64_t length, int64_t eot) {
    constexpr int64_t kBlock = 64;
    if (eot < 0 || eot > static_cast<int64_t>(std::numeric_limits<Id>::max())) return length;
    const Id wanted = static_cast<Id>(eot);
    for (; i + kBlock <= length; i += kBlock) {
        Id found = 0;
        for (int64_t j = 0; j < kBlock; ++j) found |= static_cast<Id>(ids[i + j] == wanted);
        if (found) break;
    }
    while (i < length && ids[i] != wanted) ++i;
    return i;
}

// Call visit(begin, end, supervised) for the stretches of a row in order; they cover it once. Returns the number of
// supervised ids.
template <typename Id, typename Visit>
int64_t visit_labels(const Id* ids, int64_t length, const LabelRule& rule, const Visit& visit) {
    const int64_t first = rule.policy == LabelPolicy::kAll ? length : find_eot(ids, 0, length, rule.eot);
    int64_t begin = first < length ? first + 1 : std::min<int64_t>(length, 1), targets = 0;
    visit(int64_t{0}, begin, false);
    bool supervised = true;
    while (begin < length) {
        int64_t end = length;
        if (rule.policy == LabelPolicy::kPerTurn) end = std::min(length, find_eot(ids, begin, length, rule.eot) + 1);
        visit(begin, end, supervised);
        if (supervised) targets += end - begin;
        supervised = !supervised;
        begin = end;
    }
    return targets;
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

// Fill one row at entry `at` of the buffers, its loss weight too if it has one; returns its supervised labels.
template <typename Id>
int64_t fill_row(const Id* ids, int64_t length, const LabelRule& rule, const float* weight, int64_t at,
                 const PackedBuffers& out) {
    int64_t* input_ids = out.input_ids + at;
    for (int64_t i = 0; i < length; ++i) input_ids[i] = ids[i];
    std::iota(out.position_ids + at, out.position_ids + at + length, int64_t{0});
    return visit_labels(ids, length, rule, [&](int64_t begin, int64_t end, bool supervised) {
        int64_t* labels = out.labels + at;
        if (supervised) {
            for (int64_t i = begin; i < end; ++i) labels[i] = ids[i];
        } else {
            std::fill(labels + begin, labels + end, kIgnored);
        }
        if (weight) {
            float* weights = out.loss_weights + at;
            std::fill(weights + begin, weights + end, supervised ? *weight : 0.0f);
        }
    });
}

void fill_padding(size_t at, int64_t pad, const PackedBuffers& out) {
    std::fill(out.input_ids + at, out.input_ids + out.size, pad);
    std::fill(out.labels + at, out.labels + out.size, kIgnored);
    std::fill(out.position_ids + at, out.position_ids + out.size, int64_t{0});
    if (out.loss_weights) std::fill(out.loss_weights + at, out.loss_weights + out.size, 0.0f);
}

}  // namespace

LabelPolicy label_policy(const std::string& name) {
    if (name == "first-eot") return LabelPolicy::kFirstEot;
    if (name == "per-turn") return LabelPolicy::kPerTurn;
    if (name == "all") return LabelPolicy::kAll;
    throw std::invalid_argument("labels '" + name + "': expected first-eot, per-turn or all");
}

template <typename Id>
Boundaries pack_boundaries(const RowBuffer<Id>& store, const ChosenRows& chosen, int64_t max_length, int64_t length,
                           int32_t* cu_seqlens, size_t entries) {
    if (length < 0 || length > kMostIds) throw std::invalid_argument("a pack of more than 2^31 - 1 ids");
    const int64_t most = length > 0 ? length : kMostIds;
    if (entries < chosen.count + 1) {
        throw std::invalid_argument("a pack of " + std::to_string(chosen.count) + " rows, expected at most " +
                                    std::to_string(static_cast<int64_t>(entries) - 1));
    }
    int64_t total = 0, longest = 0;
    cu_seqlens[0] = 0;
    for (size_t i = 0; i < chosen.count; ++i) {
        const int64_t ids = row_length(store, chosen.rows[i], max_length);
        total += ids;
        longest = std::max(longest, ids);
        if (total > most) {
            throw std::invalid_argument("a pack of " + std::to_string(total) + " ids or more, expected at most " +
                                        std::to_string(most));
        }
        cu_seqlens[i + 1] = static_cast<int32_t>(total);
    }
    size_t sequences = chosen.count;
    if (total < length) {
        if (++sequences >= entries) {
            throw std::invalid_argument("a pack of " + std::to_string(chosen.count) +
                                        " rows and padding, expected at most " + std::to_string(entries - 1) +
                                        " sequences");
        }
        longest = std::max(longest, length - total);
        cu_seqlens[sequences] = static_cast<int32_t>(length);
    }
    std::fill(cu_seqlens + sequences, cu_seqlens + entries, cu_seqlens[sequences]);
    return {sequences, longest};
}

template <typename Id>
int64_t fill_pack(const RowBuffer<Id>& store, const ChosenRows& chosen, const int32_t* cu_seqlens,
                  const LabelRule& rule, int64_t pad, int threads, const PackedBuffers& out) {
    if ((chosen.weights == nullptr) != (out.loss_weights == nullptr)) {
        throw std::invalid_argument("weights of rows and a buffer for loss_weights must come together");
    }
    if (cu_seqlens[0] != 0) throw std::invalid_argument("cu_seqlens must begin with 0");
    for (size_t i = 0; i < chosen.count; ++i) {
        const int64_t length = int64_t{cu_seqlens[i + 1]} - cu_seqlens[i];
        if (length < 0 || length > row_length(store, chosen.rows[i], 0)) {
            throw std::invalid_argument("cu_seqlens do not belong to these rows");
        }
    }
    const auto total = static_cast<size_t>(cu_seqlens[chosen.count]);
    if (total > out.size) {
        throw std::invalid_argument("a pack of " + std::to_string(total) + " ids, expected at most " +
                                    std::to_string(out.size));
    }
    std::vector<int64_t> targets(chosen.count);
    in_shares(
        chosen.count, threads, [&](size_t i) { return int64_t{cu_seqlens[i]}; },
        [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                const Id* ids = store.ids + store.offsets[chosen.rows[i]];
                const int64_t at = cu_seqlens[i], length = cu_seqlens[i + 1] - at;
                const float* weight = chosen.weights ? chosen.weights + i : nullptr;
                targets[i] = fill_row(ids, length, rule, weight, at, out);
            }
        });
    fill_padding(total, pad, out);
    return std::accumulate(targets.begin(), targets.end(), int64_t{0});
}

template <typename Id>
void count_targets(const RowBuffer<Id>& store, const ChosenRows& chosen, int64_t max_length, const LabelRule& rule,
                   int threads, int64_t* counts) {
    std::vector<int64_t> before(chosen.count + 1, 0);
    for (size_t i = 0; i < chosen.count; ++i) {
        before[i + 1] = before[i] + row_length(store, chosen.rows[i], max_length);
    }
    in_shares(
        chosen.count, threads, [&](size_t i) { return before[i]; },
        [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                const Id* ids = store.ids + store.offsets[chosen.rows[i]];
                counts[i] = visit_labels(ids, before[i + 1] - before[i], rule, [](int64_t, int64_t, bool) {});
            }
        });
}

// The two widths that a token store can have.
#define MEDMAX_FOR_ID(Id)                                                                                            \
    template Boundaries pack_boundaries(const RowBuffer<Id>&, const ChosenRows&, int64_t, int64_t, int32_t*, size_t); \
    template int64_t fill_pack(const RowBuffer<Id>&, const ChosenRows&, const int32_t*, const LabelRule&, int64_t,    \
                               int, const PackedBuffers&);                                                           \
    template void count_targets(const RowBuffer<Id>&, const ChosenRows&, int64_t, const LabelRule&, int, int64_t*);
MEDMAX_FOR_ID(uint16_t)
MEDMAX_FOR_ID(uint32_t)
#undef MEDMAX_FOR_ID

}  // namespace medmax
