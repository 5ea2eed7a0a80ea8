// The walk through a plan with places in memory instead of tensors, as a compiler gives registers to values. An output
// may take the place of a source that nothing reads afterwards: `combine` allows the very same view.
#include <algorithm>

#include "plan.h"

namespace amed {
namespace {

struct State {
    int x = 0, y = 0, points = 1;  // points are neighbours, from slot y on
    std::vector<int> directions;

    bool y_is_x() const { return y == x; }

    std::vector<int> used() const {
        std::vector<int> slots = directions;
        slots.push_back(x);
        for (int k = 0; k < points; ++k) slots.push_back(y + k);
        return slots;
    }
};

class Places {
  public:
    explicit Places(const std::vector<int>& taken) {
        for (const int slot : taken) take(slot, 1);
    }

    // The first of `count` neighbours that nothing lives in.
    int find(int count) {
        int first = 0;
        for (int k = 0; k < count; ++k)
            if (is_taken(first + k)) first += k + 1, k = -1;
        take(first, count);
        return first;
    }

    int size() const { return static_cast<int>(taken_.size()); }

  private:
    std::vector<bool> taken_;

    bool is_taken(int slot) const { return slot < size() && taken_[static_cast<std::size_t>(slot)]; }

    void take(int first, int count) {
        if (first + count > size()) taken_.resize(static_cast<std::size_t>(first + count));
        for (int k = 0; k < count; ++k) taken_[static_cast<std::size_t>(first + k)] = true;
    }
};

// Columns of an evaluation: x, points unless they are x, the network's answers, directions.
std::vector<int> columns_of(const State& state, const Evaluation& e) {
    std::vector<int> slots = {state.x};
    for (int k = 0; !state.y_is_x() && k < state.points; ++k) slots.push_back(state.y + k);
    for (int k = 0; k < state.points; ++k) slots.push_back(e.staged < 0 ? -1 - k : e.staged + k);
    slots.insert(slots.end(), state.directions.begin(), state.directions.end());
    return slots;
}

// Directions that live on: the newest are put in front by the caller.
void keep_oldest(std::vector<int>& directions, const std::vector<int>& old, int keep) {
    for (const int slot : old)
        if (static_cast<int>(directions.size()) < keep) directions.push_back(slot);
    directions.resize(static_cast<std::size_t>(std::min<int>(keep, static_cast<int>(directions.size()))));
}

State advance(const State& before, Evaluation& e, int& slots) {
    e.y = before.y;
    const bool data = e.new_directions == 0 && e.keep > 0;
    if (data || e.threshold || e.analytic) e.staged = Places(before.used()).find(before.points);
    const std::vector<int> columns = columns_of(before, e);
    for (const int column : e.columns) e.source.push_back(columns[static_cast<std::size_t>(column)]);

    State after;
    for (int k = 0; data && k < before.points; ++k) after.directions.push_back(e.staged + k);
    std::vector<int> old = before.directions;
    old.resize(static_cast<std::size_t>(
        std::clamp<int>(e.keep - (data ? before.points : e.new_directions), 0, static_cast<int>(old.size()))));

    std::vector<int> live = old;
    live.insert(live.end(), after.directions.begin(), after.directions.end());
    if (!e.moves_x) live.push_back(before.x);
    Places places(live);
    std::vector<int> fresh;
    for (int m = 0; m < e.new_directions; ++m) fresh.push_back(places.find(1));
    if (!data) after.directions = fresh;
    keep_oldest(after.directions, old, e.keep);
    e.output = fresh;
    after.x = e.moves_x ? places.find(1) : before.x;
    if (e.moves_x) e.output.push_back(after.x);
    after.points = e.next_points();
    after.y = e.x_is_y ? after.x : places.find(after.points);
    for (int k = 0; !e.x_is_y && k < after.points; ++k) e.output.push_back(after.y + k);
    slots = std::max({slots, places.size(), e.staged + before.points});
    return after;
}

}  // namespace

void assign_slots(Plan& plan) {
    State state;
    plan.slots = 1;
    for (Evaluation& e : plan.evaluations) state = advance(state, e, plan.slots);
    plan.result = state.y;
}

}  // namespace amed
