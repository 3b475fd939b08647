// Row ids of n-grams on CPU: the polynomial hash of rows.py (RowKernels.ngram_row_ids), exactly.

#include <cstdint>
#include <vector>

struct HashTables {
    int64_t tables, longest, base, pad_id, reset, eod_id, stripes, total, smallest;
    const int64_t *orders, *sizes, *beyond;
};

namespace {

constexpr int64_t scatter = 2533;  // as in rows.py

// window [longest] = the token at `token`, the one before it, ..; pad_id where a token is missing or hidden.
inline void read_window(const HashTables& hash, const int64_t* token, int64_t* window) {
    bool visible = true;
    for (int64_t back = 0; back < hash.longest; ++back) {
        const int64_t value = token[-back];
        bool present = value >= 0;
        if (back > 0 && hash.reset) present = visible = visible && present && value != hash.eod_id;
        window[back] = present ? value : hash.pad_id;
    }
}

// The row of a table that an n-gram hashes to. Reduced at every Horner step: every intermediate is below 2^62.
inline int64_t table_row(const HashTables& hash, int64_t table, const int64_t* window) {
    const uint64_t size = hash.sizes[table], base = hash.base % hash.sizes[table];
    uint64_t row = window[hash.orders[table] - 1] % size;
    for (int64_t back = hash.orders[table] - 2; back >= 0; --back) row = (row * base + window[back]) % size;
    return static_cast<int64_t>(row);
}

// rows.row_id.
inline int64_t row_id(const HashTables& hash, int64_t table, int64_t row, int64_t stripe_rows) {
    const int64_t number = row < hash.smallest ? row * hash.tables + table : row + hash.beyond[table];
    if (number >= stripe_rows * hash.stripes) return number;
    return number % hash.stripes * scatter % hash.stripes * stripe_rows + number / hash.stripes;
}

}  // namespace

// out [lines, length, tables] = row ids of the n-grams of extended [lines, longest - 1 + length].
extern "C" void ngram_row_ids(const int64_t* extended, int64_t lines, int64_t length, const HashTables* tables, int64_t* out) {
    const HashTables hash = *tables;
    const int64_t reach = hash.longest - 1, stripe_rows = hash.total / hash.stripes;
#pragma omp parallel
    {
        std::vector<int64_t> window(hash.longest);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < lines * length; ++at) {
            read_window(hash, extended + at / length * (length + reach) + at % length + reach, window.data());
            for (int64_t t = 0; t < hash.tables; ++t)
                out[at * hash.tables + t] = row_id(hash, t, table_row(hash, t, window.data()), stripe_rows);
        }
    }
}
