#include "prefetch.hpp"

#include <unistd.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace medmax {

struct Prefetcher::State {
    State(size_t count_, size_t slots, size_t keep_, Fill fill_)
        : count(count_), keep(keep_), fill(std::move(fill_)), owner(getpid()), ring(slots) {}

    void work();

    const size_t count, keep;
    const Fill fill;
    const pid_t owner;
    // Everything below belongs to the mutex.
    std::mutex mutex;
    std::condition_variable filled, freed;
    std::vector<FilledPack> ring;
    size_t made = 0, taken = 0, released = 0;
    std::exception_ptr error;
    bool stop = false;
    // Two threads of the consumer may close at once, but only one may join.
    std::mutex joining;
    std::thread thread;
};

void Prefetcher::State::work() {
    for (size_t index = 0; index < count; ++index) {
        const size_t slot = index % ring.size();
        {
            std::unique_lock<std::mutex> lock(mutex);
            freed.wait(lock, [&] { return stop || index < released + ring.size(); });
            if (stop) return;
        }
        FilledPack pack{};
        std::exception_ptr failure;
        try {
            pack = fill(index, slot);
        } catch (...) {
            failure = std::current_exception();
        }
        {
            std::lock_guard<std::mutex> lock(mutex);
            error = failure;
            if (!failure) {
                ring[slot] = pack;
                made = index + 1;
            }
        }
        filled.notify_all();
        if (failure) return;
    }
}

Prefetcher::Prefetcher(size_t count, size_t slots, size_t keep, Fill fill) {
    if (keep < 1 || slots <= keep) {
        throw std::invalid_argument("a ring of " + std::to_string(slots) + " buffers of which " +
                                    std::to_string(keep) + " are kept, expected at least 1 kept and 1 more");
    }
    state_ = std::make_unique<State>(count, slots, keep, std::move(fill));
    state_->thread = std::thread(&State::work, state_.get());
}

Prefetcher::~Prefetcher() {
    // A forked child has no such thread to wait for, and its copy of the condition variables is unusable.
    if (getpid() != state_->owner) {
        static_cast<void>(state_.release());
        return;
    }
    close();
}

bool Prefetcher::next(FilledPack& pack) {
    State& s = *state_;
    if (getpid() != s.owner) throw std::runtime_error("a prefetcher cannot be used in a fork of its process");
    std::unique_lock<std::mutex> lock(s.mutex);
    if (s.taken == s.count) return false;
    if (s.taken + 1 > s.keep) {
        s.released = s.taken + 1 - s.keep;
        s.freed.notify_one();
    }
    s.filled.wait(lock, [&] { return s.stop || s.error || s.made > s.taken; });
    if (s.stop) return false;
    if (s.made == s.taken) std::rethrow_exception(s.error);
    pack = s.ring[s.taken % s.ring.size()];
    ++s.taken;
    return true;
}

void Prefetcher::close() {
    State& s = *state_;
    if (getpid() != s.owner) return;
    {
        std::lock_guard<std::mutex> lock(s.mutex);
        s.stop = true;
    }
    s.freed.notify_all();
    s.filled.notify_all();
    std::lock_guard<std::mutex> alone(s.joining);
    if (s.thread.joinable()) s.thread.join();
}

namespace {

// Rows of pack p; every access to the plan goes through this check.
ChosenRows pack_rows(const PackSource& source, int64_t p) {
    if (p < 0 || static_cast<size_t>(p) >= source.num_packs) {
        throw std::out_of_range("expected 0.." + std::to_string(source.num_packs) + " (exclusive)");
    }
    const int64_t begin = source.offsets[p], end = source.offsets[p + 1];
    if (begin < 0 || end < begin || static_cast<size_t>(end) > source.num_rows) {
        throw std::out_of_range("rows " + std::to_string(begin) + ".." + std::to_string(end) +
                                " of the plan, expected inside 0.." + std::to_string(source.num_rows));
    }
    const float* weights = source.weights ? source.weights + begin : nullptr;
    return {source.rows + begin, weights, static_cast<size_t>(end - begin)};
}

}  // namespace

template <typename Id>
Prefetcher::Fill pack_filler(const RowBuffer<Id>& store, const PackSource& source, std::vector<PackSlot> slots) {
    return [store, source, slots = std::move(slots)](size_t index, size_t slot) {
        const int64_t p = source.order[index];
        const auto named = [&](const char* what) { return "pack " + std::to_string(p) + ": " + what; };
        try {
            const ChosenRows chosen = pack_rows(source, p);
            const PackSlot& target = slots[slot];
            const Boundaries boundaries = pack_boundaries(store, chosen, source.max_length, source.length,
                                                          target.cu_seqlens, target.entries);
            const int64_t ids = target.cu_seqlens[target.entries - 1];
            PackedBuffers out = target.out;
            if (static_cast<size_t>(ids) < out.size) out.size = static_cast<size_t>(ids);
            const int64_t targets = fill_pack(store, chosen, target.cu_seqlens, source.rule, source.pad,
                                              source.threads, out);
            return FilledPack{index, slot, ids, boundaries, targets};
        } catch (const std::out_of_range& error) {
            throw std::out_of_range(named(error.what()));
        } catch (const std::invalid_argument& error) {
            throw std::invalid_argument(named(error.what()));
        }
    };
}

template Prefetcher::Fill pack_filler(const RowBuffer<uint16_t>&, const PackSource&, std::vector<PackSlot>);
template Prefetcher::Fill pack_filler(const RowBuffer<uint32_t>&, const PackSource&, std::vector<PackSlot>);

}  // namespace medmax
