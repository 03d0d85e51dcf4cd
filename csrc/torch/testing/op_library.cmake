# add_op_library(name): the ops of csrc/torch as a Python module and as torch.ops.<name>, for tests
# only; what runs them is linked to it. Made where Python has torch and pybind11.
set(binding ${CMAKE_CURRENT_LIST_DIR}/..)
if(Python_FOUND)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0])"
    OUTPUT_VARIABLE torch_folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  find_package(pybind11 CONFIG)
endif()

function(add_op_library name)
  if(NOT pybind11_FOUND OR NOT torch_folder)
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS ${binding}/*.cpp)
  list(FILTER sources EXCLUDE REGEX "/module.cpp$")
  pybind11_add_module(${name} NO_EXTRAS ${binding}/testing/module.cpp ${sources})
  set_target_properties(${name} PROPERTIES CXX_VISIBILITY_PRESET hidden)
  target_compile_definitions(${name} PRIVATE LMINF_LIBRARY=${name}
    LMINF_BACKEND="testing/backend.h" TORCH_TARGET_VERSION=0x020b000000000000)
  target_include_directories(${name} SYSTEM PRIVATE ${torch_folder}/include)
  target_link_libraries(${name} PRIVATE ${torch_folder}/lib/libtorch_cpu.so)
endfunction()
