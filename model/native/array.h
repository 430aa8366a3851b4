// Memory that is aligned to cache lines; large pieces are in huge pages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shoal {

// `size` zeroes.  A large array takes memory only where it has been touched.
template <class T>
class Array {
public:
    Array() = default;
    explicit Array(size_t size) : size_(size) {
        if (size == 0) return;
        const size_t bytes = size * sizeof(T);
#if defined(__linux__)
        if (bytes >= kLarge) {
            map(bytes);
            return;
        }
#endif
        const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        data_ = static_cast<T*>(std::aligned_alloc(kAlignment, rounded));
        if (!data_) throw std::bad_alloc();
        for (size_t i = 0; i < size; ++i) data_[i] = T{};
    }
    Array(Array&& other) noexcept { swap(other); }
    Array& operator=(Array&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Array() {
#if defined(__linux__)
        if (mapped_) {
            munmap(mapped_, mapped_bytes_);
            return;
        }
#endif
        std::free(data_);
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

    // Makes room for `size` elements; the former elements are lost.
    void reserve(size_t size) {
        if (size > size_) *this = Array(size);
    }

private:
    static constexpr size_t kAlignment = 64;
    static constexpr size_t kLarge = size_t{4} << 20;
    static constexpr size_t kHugePage = size_t{2} << 20;

    void swap(Array& other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(mapped_, other.mapped_);
        std::swap(mapped_bytes_, other.mapped_bytes_);
    }

#if defined(__linux__)
    void map(size_t bytes) {
        mapped_bytes_ = bytes + kHugePage;
        mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped_ == MAP_FAILED) {
            mapped_ = nullptr;
            throw std::bad_alloc();
        }
        const size_t begin = (reinterpret_cast<size_t>(mapped_) + kHugePage - 1) / kHugePage * kHugePage;
        data_ = reinterpret_cast<T*>(begin);
        madvise(data_, bytes, MADV_HUGEPAGE);
    }
#endif

    T* data_ = nullptr;
    size_t size_ = 0;
    void* mapped_ = nullptr;
    size_t mapped_bytes_ = 0;
};

// Gives out memory that lives as long as the arena.  Its pieces are large enough for huge pages: a step reads all the
// weights of a model, and from small pages that takes a tenth longer.
class Arena {
public:
    // `size` zeroes, aligned to a cache line.
    template <class T>
    T* take(size_t size) {
        const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
        if (bytes > left_) {
            pieces_.emplace_back(std::max(bytes, kPiece));
            next_ = pieces_.back().data();
            left_ = pieces_.back().size();
        }
        T* const taken = reinterpret_cast<T*>(next_);
        next_ += bytes;
        left_ -= bytes;
        return taken;
    }

private:
    static constexpr size_t kPiece = size_t{64} << 20;

    std::vector<Array<char>> pieces_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

}  // namespace shoal
