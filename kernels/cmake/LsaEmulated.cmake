# CUDA kernels on the CPU (tests/emulated): for builds without CUDA on machines that have its headers and a C++ compiler. Fibers and
# sanitizers do not go together.
include(CheckLanguage)
check_language(CXX)
find_path(LSA_CUDA_HEADERS cuda_runtime.h HINTS /usr/local/cuda/include)
mark_as_advanced(LSA_CUDA_HEADERS)
if(NOT CMAKE_CXX_COMPILER OR NOT LSA_CUDA_HEADERS OR LSA_HAVE_CUDA OR LSA_SANITIZE OR NOT CMAKE_C_COMPILER_ID STREQUAL GNU)
  return()
endif()
enable_language(CXX)
set(CMAKE_CXX_STANDARD 17)

# NAME: tests/emulated/test_NAME.cpp with translated kernels. INCLUDES: sources that it includes as emulated/<name>.cpp (to reach
# their static kernels); SOURCES: sources of their own.
function(lsa_emulated name)
  cmake_parse_arguments(A "" "" "INCLUDES;SOURCES" ${ARGN})
  set(made "")
  set(own "")
  foreach(cu ${A_INCLUDES} ${A_SOURCES})
    string(REGEX REPLACE "[/.]" "_" stem ${cu})
    set(out ${PROJECT_BINARY_DIR}/emulated/${stem}.cpp)
    add_custom_command(OUTPUT ${out} COMMAND ${LSA_PYTHON} ${PROJECT_SOURCE_DIR}/tests/emulated/emu/translate.py
                       ${PROJECT_SOURCE_DIR}/kernels/cuda/${cu} ${out}
                       DEPENDS ${PROJECT_SOURCE_DIR}/kernels/cuda/${cu} ${PROJECT_SOURCE_DIR}/tests/emulated/emu/translate.py)
    list(APPEND made ${out})
    if(cu IN_LIST A_SOURCES)
      list(APPEND own ${out})
    endif()
  endforeach()
  add_custom_target(emulated_${name} DEPENDS ${made})
  add_executable(t_ops_emulated_${name} tests/emulated/test_${name}.cpp tests/emulated/emu/emu.cpp ${own})
  add_dependencies(t_ops_emulated_${name} emulated_${name})
  target_include_directories(t_ops_emulated_${name} PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR})
  target_include_directories(t_ops_emulated_${name} SYSTEM PRIVATE ${LSA_CUDA_HEADERS})
  target_compile_options(t_ops_emulated_${name} PRIVATE -O2 -w -ffp-contract=off)
  target_link_libraries(t_ops_emulated_${name} PRIVATE lsa_testkit)
  set_target_properties(t_ops_emulated_${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  add_test(NAME ops.emulated_${name} COMMAND t_ops_emulated_${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  set_tests_properties(ops.emulated_${name} PROPERTIES LABELS ops TIMEOUT ${LSA_TEST_TIMEOUT}
                       ENVIRONMENT "LSA_PYTHON=${LSA_PYTHON}")
endfunction()

lsa_emulated(select INCLUDES serve/select.cu)
lsa_emulated(update INCLUDES step/update.cu)
lsa_emulated(eval INCLUDES step/eval.cu)
lsa_emulated(index INCLUDES teacher/select.cu)
set(teacher teacher/streams.cu teacher/project.cu teacher/select.cu teacher/attend.cu teacher/moe.cu teacher/slots.cu teacher/marks.cu
    teacher/weights.cu teacher/teacher.cu)
set(session ${teacher} decode/memory.cu decode/select.cu decode/pages.cu decode/session.cu)
lsa_emulated(bf16 SOURCES teacher/bf16_attend.cu teacher/bf16_streams.cu teacher/bf16_project.cu teacher/bf16_moe.cu
             teacher/bf16_layer.cu teacher/select.cu)
lsa_emulated(teacher SOURCES ${teacher})
lsa_emulated(dump SOURCES ${teacher})
lsa_emulated(session SOURCES ${session})
lsa_emulated(codec INCLUDES decode/pages.cu SOURCES decode/memory.cu)
lsa_emulated(tiers SOURCES ${session})
lsa_emulated(soak SOURCES ${session})
lsa_emulated(validate SOURCES ${session})
