"""The Triton kernels of the mLSTM's chunkwise-parallel form; ``chunkwise_triton`` puts them together.

Two levels. Tokens are cut into tiles of BT, chunks are NT tiles. States are carried from tile to tile in registers and
written once a chunk; inside a chunk tiles attend to the tiles before them.

Gates are kept relative to tiles, so that no large sum of log forget gates is subtracted from another. For a tile i:
b_t = Σ_{u ≤ t} log σ(f_u) and r_s = Σ_{u > s} log σ(f_u), both over u in the tile; g_i the tile's whole sum; m_i the
max state before it. Exponents subtract max states first, which is exact where they matter. The weight of source s
(tile j) in the output of token t (tile i > j) then factors into numbers of at most 1:

    exp(b_t + m_i − m_t) · exp(Σ_{j < l < i} g_l + m_{j+1} − m_i) · exp(i_s + r_s − m_{j+1})
         row_t                        step_ij                            column_s

and only the diagonal tile needs a matrix of exponentials.
"""
