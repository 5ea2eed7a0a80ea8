// A plan as read from JSON, checked, with a place in memory for every tensor that it ever needs.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "amed/types.h"

namespace amed {

constexpr int kBasis = 8;  // 1, m, 1/m, c, c m, c/m, c/r, c/(r m): see amed_engine/engine/export/tableau.py

struct Evaluation {
    std::vector<double> sigma, sigma_net;  // one of each point; empty: the predictor's midpoint
    std::vector<int> columns;
    int rows = 0;
    std::vector<double> weights;  // (rows, columns, learned ? kBasis : 1)
    bool learned = false;
    int new_directions = 0, keep = 0;
    bool moves_x = false, x_is_y = false, analytic = false, threshold = false;
    std::vector<double> predict;  // sigma and sigma_next of the interval, or empty

    // Slots, by `assign_slots`. A source below zero is the network's own output, -1 - k at point k.
    std::vector<int> source, output;
    int y = 0;        // first slot of the points evaluated, which are neighbours
    int staged = -1;  // first slot of a copy of the denoised data, where one is needed; -1: none

    int points() const { return sigma.empty() ? 1 : static_cast<int>(sigma.size()); }
    int next_points() const { return rows - new_directions - (moves_x && !x_is_y ? 1 : 0); }
};

struct PredictorWeights {
    double scale_dir = 0, scale_time = 0;
    int pixels = 0, hidden = 0, encoded = 0, noise_channels = 0;
    std::vector<double> frequencies;
    // Weight and bias of map_layer0, enc_layer0, enc_layer1, fc_r, fc_scale_dir, fc_scale_time; empty where absent.
    std::vector<float> parameters[12];
};

// What the first step takes the data to be about, see `MeanRows` in tableau.py.
struct Mean {
    int classes = 0, rows = 0;
    std::vector<float> values;  // (rows, size), empty for zero
};

struct Plan {
    std::vector<double> sigmas;
    std::vector<Evaluation> evaluations;
    bool has_predictor = false;
    PredictorWeights predictor;
    Mean mean;
    std::int64_t size = 0;  // of one sample, 0 for any
    double guidance_scale = 1;
    int max_points = 1;
    int nfe = 0;
    int slots = 0, result = 0;
};

// Throws Error(AMED_ERROR_FORMAT), naming the entry.
Plan read_plan(std::string_view text);

// Where every tensor of the walk lives; part of `read_plan`.
void assign_slots(Plan& plan);

}  // namespace amed
