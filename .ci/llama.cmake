# Read by CMake after llama.cpp's own project() line, when `make test` compiles the optional engine (see Makefile).
# The tests need libllama alone. Processor time: 685 s as the package comes, 185 s so; the CPU kernels keep -O3 and native instructions.

# The package forces this option on in the cache; a plain variable goes before it.
set(LLAMA_BUILD_COMMON OFF)

# libllama builds graphs, reads files and splits text: its speed is not that of a step. At -O0 text is split seven times slower.
cmake_language(DEFER CALL target_compile_options llama PRIVATE -O1)
cmake_language(DEFER CALL target_precompile_headers llama PRIVATE
    <algorithm> <cinttypes> <regex> <sstream> <unordered_map> ${CMAKE_CURRENT_SOURCE_DIR}/src/models/models.h)
