"""How the weights of a GGUF file can be stored, by the names that llama.cpp gives them."""

#: Written by :mod:`zotune.engines.gguf.convert` itself.
DIRECT = ("f32", "f16", "bf16", "q8_0", "q4_0")
#: Written by llama.cpp, from a file of one of the others.
BY_ENGINE = (
    "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
OUTTYPES = (*DIRECT, *BY_ENGINE)
