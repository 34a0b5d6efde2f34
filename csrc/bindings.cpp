// The table of contents of medmax_fast._csrc: every function takes NumPy arrays, releases the GIL and calls the C++ of
// the same name. Arrays of another dtype or layout are refused (TypeError), never converted by copying; what is wrong
// inside them is reported by the C++ (std::invalid_argument as ValueError, std::out_of_range as IndexError).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "balance.hpp"
#include "collator.hpp"
#include "expand.hpp"
#include "json_ids.hpp"
#include "planner.hpp"
#include "prefetch.hpp"
#include "resample.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// A vector as a NumPy array that owns it.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owner = new std::vector<T>(std::move(values));
    py::capsule free(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owner->size()), owner->data(), free);
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

template <typename Id>
medmax::RowBuffer<Id> row_buffer(const Array<Id>& ids, const Array<int64_t>& offsets) {
    require(ids.ndim() == 1 && offsets.ndim() == 1 && offsets.size() >= 1, "ids [M] and offsets [N + 1], N >= 0");
    return {ids.data(), static_cast<size_t>(ids.size()), offsets.data(), static_cast<size_t>(offsets.size()) - 1};
}

py::tuple plan_packs(const Array<int64_t>& lengths, int64_t capacity, uint64_t seed, uint64_t epoch) {
    const int64_t* data = lengths.data();
    const auto count = static_cast<size_t>(lengths.size());
    medmax::Plan plan;
    {
        py::gil_scoped_release release;
        plan = medmax::plan_packs(data, count, capacity, seed, epoch);
    }
    return py::make_tuple(to_numpy(std::move(plan.rows)), to_numpy(std::move(plan.offsets)));
}

py::array_t<int32_t> share_packs(const Array<int64_t>& lengths, const Array<int64_t>& rows,
                                 const Array<int64_t>& offsets, int64_t packs_per_step, int64_t world) {
    require(offsets.size() >= 1, "offsets [packs + 1], expected at least one");
    const medmax::PlannedRows plan{lengths.data(), static_cast<size_t>(lengths.size()),
                                   rows.data(),    static_cast<size_t>(rows.size()),
                                   offsets.data(), static_cast<size_t>(offsets.size()) - 1};
    std::vector<int32_t> places;
    {
        py::gil_scoped_release release;
        places = medmax::share_packs(plan, packs_per_step, world);
    }
    return to_numpy(std::move(places));
}

const float* data_or_null(const std::optional<Array<float>>& values) { return values ? values->data() : nullptr; }

medmax::ChosenRows chosen_rows(const Array<int64_t>& rows, const std::optional<Array<float>>& weights = {}) {
    require(!weights || weights->size() == rows.size(), "weights must hold one entry per row");
    return {rows.data(), data_or_null(weights), static_cast<size_t>(rows.size())};
}

template <typename Id>
py::tuple pack_boundaries(const Array<Id>& ids, const Array<int64_t>& offsets, const Array<int64_t>& rows,
                          int64_t max_length, int64_t length, Array<int32_t> cu_seqlens) {
    const auto store = row_buffer(ids, offsets);
    const auto chosen = chosen_rows(rows);
    int32_t* out = cu_seqlens.mutable_data();
    const auto entries = static_cast<size_t>(cu_seqlens.size());
    medmax::Boundaries found{};
    {
        py::gil_scoped_release release;
        found = medmax::pack_boundaries(store, chosen, max_length, length, out, entries);
    }
    return py::make_tuple(found.sequences, found.longest);
}

template <typename Id>
int64_t fill_pack(const Array<Id>& ids, const Array<int64_t>& offsets, const Array<int64_t>& rows,
                  const Array<int32_t>& cu_seqlens, int64_t eot, int threads, Array<int64_t> input_ids,
                  Array<int64_t> labels, Array<int64_t> position_ids, const std::string& policy, int64_t pad,
                  const std::optional<Array<float>>& weights, std::optional<Array<float>> loss_weights) {
    const auto store = row_buffer(ids, offsets);
    const auto chosen = chosen_rows(rows, weights);
    require(cu_seqlens.size() > rows.size(), "cu_seqlens must hold one entry more than rows");
    const int64_t total = cu_seqlens.data()[cu_seqlens.size() - 1];
    require(total >= 0 && input_ids.size() >= total && labels.size() >= total && position_ids.size() >= total &&
                (!loss_weights || loss_weights->size() >= total),
            "input_ids, labels, position_ids and loss_weights must hold cu_seqlens[-1] entries");
    const medmax::PackedBuffers out{input_ids.mutable_data(), labels.mutable_data(), position_ids.mutable_data(),
                                    loss_weights ? loss_weights->mutable_data() : nullptr,
                                    static_cast<size_t>(total)};
    const medmax::LabelRule rule{medmax::label_policy(policy), eot};
    py::gil_scoped_release release;
    return medmax::fill_pack(store, chosen, cu_seqlens.data(), rule, pad, threads, out);
}

template <typename Id>
void count_targets(const Array<Id>& ids, const Array<int64_t>& offsets, const Array<int64_t>& rows,
                   int64_t max_length, int64_t eot, int threads, Array<int64_t> counts, const std::string& policy) {
    const auto store = row_buffer(ids, offsets);
    const auto chosen = chosen_rows(rows);
    require(counts.size() == rows.size(), "counts must hold one entry per row");
    const medmax::LabelRule rule{medmax::label_policy(policy), eot};
    int64_t* out = counts.mutable_data();
    py::gil_scoped_release release;
    medmax::count_targets(store, chosen, max_length, rule, threads, out);
}

// A Prefetcher with the arrays that its thread reads and writes, which must outlive it.
struct PackStream {
    std::vector<py::object> arrays;
    std::unique_ptr<medmax::Prefetcher> packs;

    ~PackStream() {
        py::gil_scoped_release release;
        packs.reset();
    }
};

// The ring is slot s of input_ids, labels, position_ids, loss_weights [S, T] and cu_seqlens [S, n + 1].
template <typename Id>
std::unique_ptr<PackStream> make_prefetcher(const Array<Id>& ids, const Array<int64_t>& offsets,
                                            const Array<int64_t>& rows, const std::optional<Array<float>>& weights,
                                            const Array<int64_t>& plan_offsets, const Array<int64_t>& order,
                                            int64_t eot, const std::string& policy, int64_t max_length,
                                            int64_t length, int64_t pad, int threads, size_t keep,
                                            Array<int64_t> input_ids, Array<int64_t> labels,
                                            Array<int64_t> position_ids, std::optional<Array<float>> loss_weights,
                                            Array<int32_t> cu_seqlens) {
    require(plan_offsets.size() >= 1, "plan_offsets [P + 1], P >= 0");
    require(input_ids.ndim() == 2 && cu_seqlens.ndim() == 2 && cu_seqlens.shape(0) == input_ids.shape(0),
            "input_ids [S, T] and cu_seqlens [S, n + 1]");
    require(labels.size() == input_ids.size() && position_ids.size() == input_ids.size() &&
                (!loss_weights || loss_weights->size() == input_ids.size()),
            "labels, position_ids and loss_weights must be as large as input_ids");
    const auto store = row_buffer(ids, offsets);
    const auto chosen = chosen_rows(rows, weights);
    const medmax::PackSource source{
        chosen.rows,        chosen.weights, chosen.count, plan_offsets.data(),
        static_cast<size_t>(plan_offsets.size()) - 1, order.data(), static_cast<size_t>(order.size()), max_length,
        length,             {medmax::label_policy(policy), eot}, pad, threads};
    const auto size = static_cast<size_t>(input_ids.shape(1)), entries = static_cast<size_t>(cu_seqlens.shape(1));
    std::vector<medmax::PackSlot> slots;
    for (size_t s = 0; s < static_cast<size_t>(input_ids.shape(0)); ++s) {
        const size_t at = s * size;
        float* slot_weights = loss_weights ? loss_weights->mutable_data() + at : nullptr;
        slots.push_back({{input_ids.mutable_data() + at, labels.mutable_data() + at,
                          position_ids.mutable_data() + at, slot_weights, size},
                         cu_seqlens.mutable_data() + s * entries, entries});
    }
    auto stream = std::make_unique<PackStream>();
    stream->arrays = {ids, offsets, rows, plan_offsets, order, input_ids, labels, position_ids, cu_seqlens};
    if (weights) stream->arrays.push_back(*weights);
    if (loss_weights) stream->arrays.push_back(*loss_weights);
    const size_t count = source.count, ring = slots.size();
    stream->packs = std::make_unique<medmax::Prefetcher>(count, ring, keep,
                                                         medmax::pack_filler(store, source, std::move(slots)));
    return stream;
}

// (slot, ids, sequences, longest, targets) of the next pack; None behind the last one.
py::object next_pack(PackStream& stream) {
    medmax::FilledPack pack{};
    bool found = false;
    {
        py::gil_scoped_release release;
        found = stream.packs->next(pack);
    }
    if (!found) return py::none();
    return py::make_tuple(pack.slot, pack.ids, pack.boundaries.sequences, pack.boundaries.longest, pack.targets);
}

py::tuple lanczos_weights(int64_t in, int64_t out, int64_t first, int64_t count) {
    medmax::Filter filter;
    {
        py::gil_scoped_release release;
        filter = medmax::lanczos_filter(in, out, first, count);
    }
    return py::make_tuple(to_numpy(std::move(filter.starts)),
                          to_numpy(std::move(filter.weights)).reshape({count, filter.taps}));
}

void resample(const Array<uint8_t>& pixels, int64_t full_height, int64_t full_width, int64_t top, int64_t left,
              Array<uint8_t> out, int threads, bool plain) {
    require(pixels.ndim() == 3 && (pixels.shape(2) == 3 || pixels.shape(2) == 4), "pixels [height, width, 3 or 4]");
    require(out.ndim() == 3 && out.shape(2) == 3, "out [height, width, 3]");
    const medmax::Picture picture{pixels.data(), pixels.shape(0), pixels.shape(1),
                                  static_cast<int>(pixels.shape(2))};
    const medmax::Window window{full_height, full_width, top, left, out.shape(0), out.shape(1)};
    uint8_t* target = out.mutable_data();
    py::gil_scoped_release release;
    medmax::resample(picture, window, threads, plain, target);
}

// Blocks of codes as they lie in memory; whoever calls keeps the arrays alive.
medmax::ImageRows image_rows(const py::list& codes, const Array<int64_t>& which, const Array<int64_t>& offsets) {
    medmax::ImageRows images{{}, which.data(), static_cast<size_t>(which.size()), offsets.data()};
    for (const auto& item : codes) {
        if (!Array<uint16_t>::check_(item)) throw py::type_error("codes must be contiguous uint16 arrays");
        const auto block = py::reinterpret_borrow<Array<uint16_t>>(item);
        require(block.ndim() == 2 && block.shape(1) == medmax::kImageCodes, "codes [images, 1024]");
        images.blocks.push_back({block.data(), static_cast<int64_t>(block.shape(0))});
    }
    return images;
}

template <typename Text, typename Id>
py::tuple expand_into(const medmax::TextRows<Text>& text, const medmax::ImageRows& images,
                      const medmax::SpecialIds& special, int threads) {
    std::vector<int64_t> offsets(text.count + 1), values(text.count);
    std::vector<uint8_t> kinds(text.count);
    std::unique_ptr<Id[]> ids;
    {
        py::gil_scoped_release release;
        medmax::measure_rows(text, images, special, threads, offsets.data(), kinds.data(), values.data());
        // Not a vector, which would write zeros first.
        ids.reset(new Id[static_cast<size_t>(offsets.back())]);
        medmax::write_rows(text, images, special, threads, offsets.data(), ids.get());
    }
    const auto count = static_cast<py::ssize_t>(offsets.back());
    py::capsule free(ids.get(), [](void* p) { delete[] static_cast<Id*>(p); });
    py::array_t<Id> out(count, ids.release(), free);
    return py::make_tuple(out, to_numpy(std::move(offsets)), to_numpy(std::move(kinds)), to_numpy(std::move(values)));
}

template <typename Text>
py::tuple expand_rows(const Array<Text>& text, const Array<int64_t>& text_offsets, const Array<uint8_t>& ready,
                      const py::list& codes, const Array<int64_t>& images, const Array<int64_t>& image_offsets,
                      const Array<int64_t>& special, bool wide, int threads) {
    const auto count = static_cast<size_t>(ready.size());
    require(static_cast<size_t>(text_offsets.size()) == count + 1 &&
                static_cast<size_t>(image_offsets.size()) == count + 1,
            "text_offsets and image_offsets must hold one entry more than ready");
    require(special.size() == 8, "special: bos, eos, image_start, num_codes, eoi, boi, placeholder, vocab_size");
    const int64_t* s = special.data();
    const medmax::SpecialIds ids{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]};
    require(wide || ids.vocab_size <= 1 << 16, "a vocabulary of more than 65,536 ids needs wide ids");
    const medmax::TextRows<Text> rows{text.data(), static_cast<size_t>(text.size()), text_offsets.data(),
                                      ready.data(), count};
    const auto blocks = image_rows(codes, images, image_offsets);
    return wide ? expand_into<Text, uint32_t>(rows, blocks, ids, threads)
                : expand_into<Text, uint16_t>(rows, blocks, ids, threads);
}

template <typename Id>
py::tuple json_ids(const py::bytes& text, const std::string& key, uint64_t limit) {
    char* data = nullptr;
    py::ssize_t size = 0;
    if (PyBytes_AsStringAndSize(text.ptr(), &data, &size)) throw py::error_already_set();
    require(limit <= uint64_t{std::numeric_limits<Id>::max()} + 1, "limit beyond the width of the ids");
    medmax::JsonIds<Id> found;
    {
        py::gil_scoped_release release;
        found = medmax::scan_json_ids<Id>(data, static_cast<size_t>(size), key, limit);
    }
    return py::make_tuple(to_numpy(std::move(found.ids)), to_numpy(std::move(found.offsets)),
                          to_numpy(std::move(found.spans)));
}

template <typename Text>
void define_expand(py::module_& m) {
    m.def("expand_rows", &expand_rows<Text>, py::arg("text").noconvert(), py::arg("text_offsets").noconvert(),
          py::arg("ready").noconvert(), py::arg("codes"), py::arg("images").noconvert(),
          py::arg("image_offsets").noconvert(), py::arg("special").noconvert(), py::arg("wide"), py::arg("threads"));
}

// The functions over a buffer of ids, once per width of id.
template <typename Id>
void define_collator(py::module_& m) {
    const auto ids = py::arg("ids").noconvert();
    const auto offsets = py::arg("offsets").noconvert();
    const auto rows = py::arg("rows").noconvert();
    const auto cu_seqlens = py::arg("cu_seqlens").noconvert();
    m.def("pack_boundaries", &pack_boundaries<Id>, ids, offsets, rows, py::arg("max_length"), py::arg("length"),
          cu_seqlens);
    m.def("fill_pack", &fill_pack<Id>, ids, offsets, rows, cu_seqlens, py::arg("eot"), py::arg("threads"),
          py::arg("input_ids").noconvert(), py::arg("labels").noconvert(), py::arg("position_ids").noconvert(),
          py::arg("policy") = "first-eot", py::arg("pad") = 1, py::arg("weights").noconvert() = py::none(),
          py::arg("loss_weights").noconvert() = py::none());
    m.def("count_targets", &count_targets<Id>, ids, offsets, rows, py::arg("max_length"), py::arg("eot"),
          py::arg("threads"), py::arg("counts").noconvert(), py::arg("policy") = "first-eot");
}

template <typename Id>
void define_prefetcher(py::class_<PackStream>& stream) {
    stream.def(py::init(&make_prefetcher<Id>), py::arg("ids").noconvert(), py::arg("offsets").noconvert(),
               py::arg("rows").noconvert(), py::arg("weights").noconvert(), py::arg("plan_offsets").noconvert(),
               py::arg("order").noconvert(), py::arg("eot"), py::arg("policy"), py::arg("max_length"),
               py::arg("length"), py::arg("pad"), py::arg("threads"), py::arg("keep"),
               py::arg("input_ids").noconvert(), py::arg("labels").noconvert(),
               py::arg("position_ids").noconvert(), py::arg("loss_weights").noconvert(),
               py::arg("cu_seqlens").noconvert());
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
    m.doc() = "See medmax_fast.data.{resize,sequences,chunks,packing,balance,collate,prefetch}.";
    m.def("plan_packs", &plan_packs, py::arg("lengths").noconvert(), py::arg("capacity"), py::arg("seed"),
          py::arg("epoch"));
    m.def("share_packs", &share_packs, py::arg("lengths").noconvert(), py::arg("rows").noconvert(),
          py::arg("offsets").noconvert(), py::arg("packs_per_step"), py::arg("world"));
    m.def("lanczos_weights", &lanczos_weights, py::arg("in_size"), py::arg("out_size"), py::arg("first"),
          py::arg("count"));
    m.def("resample", &resample, py::arg("pixels").noconvert(), py::arg("full_height"), py::arg("full_width"),
          py::arg("top"), py::arg("left"), py::arg("out").noconvert(), py::arg("threads") = 1,
          py::arg("plain") = false);
    m.def("has_avx2", &medmax::has_avx2);
    define_collator<uint16_t>(m);
    define_collator<uint32_t>(m);
    py::class_<PackStream> stream(m, "Prefetcher");
    stream.def("next", &next_pack);
    stream.def("close", [](PackStream& self) { self.packs->close(); }, py::call_guard<py::gil_scoped_release>());
    define_prefetcher<uint16_t>(stream);
    define_prefetcher<uint32_t>(stream);
    define_expand<int32_t>(m);
    define_expand<int64_t>(m);
    define_expand<uint16_t>(m);
    define_expand<uint32_t>(m);
    m.def("json_ids_16", &json_ids<uint16_t>, py::arg("text"), py::arg("key"), py::arg("limit"));
    m.def("json_ids_32", &json_ids<uint32_t>, py::arg("text"), py::arg("key"), py::arg("limit"));
}
