// The table of contents of medmax_fast._csrc: every function takes NumPy arrays, releases the GIL and calls the C++ of
// the same name. Arrays of another dtype or layout are refused (TypeError), never converted by copying; what is wrong
// inside them is reported by the C++ (std::invalid_argument as ValueError, std::out_of_range as IndexError).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "collator.hpp"
#include "planner.hpp"
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

template <typename Id>
void pack_boundaries(const Array<Id>& ids, const Array<int64_t>& offsets, const Array<int64_t>& rows,
                     int64_t max_length, Array<int32_t> cu_seqlens) {
    const auto store = row_buffer(ids, offsets);
    require(cu_seqlens.size() == rows.size() + 1, "cu_seqlens must hold one entry more than rows");
    int32_t* out = cu_seqlens.mutable_data();
    py::gil_scoped_release release;
    medmax::pack_boundaries(store, rows.data(), static_cast<size_t>(rows.size()), max_length, out);
}

template <typename Id>
int64_t fill_pack(const Array<Id>& ids, const Array<int64_t>& offsets, const Array<int64_t>& rows,
                  const Array<int32_t>& cu_seqlens, int64_t eot, int threads, Array<int64_t> input_ids,
                  Array<int64_t> labels, Array<int64_t> position_ids) {
    const auto store = row_buffer(ids, offsets);
    require(cu_seqlens.size() == rows.size() + 1, "cu_seqlens must hold one entry more than rows");
    const int64_t total = cu_seqlens.data()[rows.size()];
    require(cu_seqlens.data()[0] == 0, "cu_seqlens must begin with 0");
    require(input_ids.size() == total && labels.size() == total && position_ids.size() == total,
            "input_ids, labels and position_ids must hold cu_seqlens[-1] entries");
    const medmax::PackedBuffers out{input_ids.mutable_data(), labels.mutable_data(), position_ids.mutable_data()};
    py::gil_scoped_release release;
    return medmax::fill_pack(store, rows.data(), static_cast<size_t>(rows.size()), cu_seqlens.data(), eot, threads,
                             out);
}

template <typename Id>
void count_targets(const Array<Id>& ids, const Array<int64_t>& offsets, const Array<int64_t>& rows,
                   int64_t max_length, int64_t eot, int threads, Array<int64_t> counts) {
    const auto store = row_buffer(ids, offsets);
    require(counts.size() == rows.size(), "counts must hold one entry per row");
    int64_t* out = counts.mutable_data();
    py::gil_scoped_release release;
    medmax::count_targets(store, rows.data(), static_cast<size_t>(rows.size()), max_length, eot, threads, out);
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

// The functions over a buffer of ids, once per width of id.
template <typename Id>
void define_collator(py::module_& m) {
    const auto ids = py::arg("ids").noconvert();
    const auto offsets = py::arg("offsets").noconvert();
    const auto rows = py::arg("rows").noconvert();
    const auto cu_seqlens = py::arg("cu_seqlens").noconvert();
    m.def("pack_boundaries", &pack_boundaries<Id>, ids, offsets, rows, py::arg("max_length"), cu_seqlens);
    m.def("fill_pack", &fill_pack<Id>, ids, offsets, rows, cu_seqlens, py::arg("eot"), py::arg("threads"),
          py::arg("input_ids").noconvert(), py::arg("labels").noconvert(), py::arg("position_ids").noconvert());
    m.def("count_targets", &count_targets<Id>, ids, offsets, rows, py::arg("max_length"), py::arg("eot"),
          py::arg("threads"), py::arg("counts").noconvert());
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
    m.doc() = "Resampling, packing planner, collator; see medmax_fast.data.{resize,packing,collate}.";
    m.def("plan_packs", &plan_packs, py::arg("lengths").noconvert(), py::arg("capacity"), py::arg("seed"),
          py::arg("epoch"));
    m.def("lanczos_weights", &lanczos_weights, py::arg("in_size"), py::arg("out_size"), py::arg("first"),
          py::arg("count"));
    m.def("resample", &resample, py::arg("pixels").noconvert(), py::arg("full_height"), py::arg("full_width"),
          py::arg("top"), py::arg("left"), py::arg("out").noconvert(), py::arg("threads") = 1,
          py::arg("plain") = false);
    m.def("has_avx2", &medmax::has_avx2);
    define_collator<uint16_t>(m);
    define_collator<uint32_t>(m);
}
