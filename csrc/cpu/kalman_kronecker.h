// SPDX-License-Identifier: Apache-2.0
// Blocks of the Kalman update whose Jacobian has rows kron(g_c, x), as that of the weight [m, n] of
// a linear layer that was fed one vector: never formed, neither stored nor computed.
//
// With P = p as [m, n] and y = P x^2, the block's share of H diag(p) H^T is that of a dense block
// of m parameters, with the Jacobian G |x| and the variances y / |x|^2 <= max p; its share of H H^T
// is that without the variances. Then mean_ij += p_ij x_j (g_i^T u) and t_ij = p_ij x_j^2 |W
// g_i|^2: one pass over P that weighs, and one over the state that writes, for any number of
// outputs.
#pragma once

#include <cstdint>
#include <vector>

#include "../kernels.h"
#include "kalman_sweep.h"
#include "parallel.h"

namespace grng::kalman {

class KroneckerBlocks {
 public:
  // Takes the blocks that are factored and not empty.
  KroneckerBlocks(const KalmanPiece* blocks, int64_t count, int64_t outputs);

  bool empty() const { return blocks_.empty(); }
  // Whether all elements of the factors are.
  bool finite() const { return finite_; }

  // The first pass: what it finds in the state. Then the terms can be used.
  Extremes weigh(const Threads& threads);
  // The dense blocks that have the same share in the sums.
  const std::vector<KalmanPiece>& terms() const { return terms_; }

  // What the second pass applies to every row; false where that is beyond the range of fp32.
  bool prepare(const KalmanGain& gain, const Threads& threads);
  // The second pass, which needs no memory.
  void apply(const Prediction& next, const Threads& threads);

 private:
  struct Block {
    float *mean, *variance;
    int64_t rows, cols;
    // Padded to whole vectors: x, scaled by a power of two to a maximum in [0.5, 1), and x^2,
    // scaled to the sum 0.5.
    float *x, *squares;
    double norm;  // of the scaled x
    // Of the term: [outputs, rows], [rows], [rows].
    float *g, *y, *zeros;
    // Of the second pass: g_i^T u and |W g_i|^2, in units of x and of the squares.
    float *pull, *weight;
  };
  // Rows [begin, end) of a block.
  struct Slice {
    const Block* block;
    int64_t begin, end;
  };

  template <class Isa>
  void fill(Block& b, const KalmanPiece& given);
  template <class Isa>
  void prepare_rows(const Slice& strip, float* room, const float* direction, const float* packed,
                    const int64_t* extents) const;

  int64_t outputs_;
  bool finite_ = true;
  Buffer<float> memory_;
  std::vector<Block> blocks_;
  std::vector<Slice> slices_;
  std::vector<KalmanPiece> terms_;
};

}  // namespace grng::kalman
