# Where libtorch and torchcodec's image operators lie: TORCH_DIR and TORCHCODEC_IMAGE, asked of Python where they are not given.
# Used by mmembed's own build and by its installed package. find_package(Torch) is not used: that of a CUDA build wants the whole
# CUDA toolkit, which a host does not need.
set(TORCH_DIR "" CACHE PATH "libtorch: a folder with include/ and lib/; empty asks Python")
set(TORCHCODEC_IMAGE "" CACHE FILEPATH "libtorchcodec_image.so; empty asks Python")

function(mmembed_find_libtorch found why)
  set(${found} FALSE PARENT_SCOPE)
  set(torch "${TORCH_DIR}")
  set(codec "${TORCHCODEC_IMAGE}")
  if(NOT torch)
    if(NOT Python_EXECUTABLE)
      find_program(Python_EXECUTABLE NAMES python3 python)
    endif()
    if(NOT Python_EXECUTABLE)
      set(${why} "no Python to ask for torch: give -DTORCH_DIR=... or -DPython_EXECUTABLE=..." PARENT_SCOPE)
      return()
    endif()
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin)); s = u.find_spec('torchcodec'); print(os.path.join(os.path.dirname(s.origin), 'libtorchcodec_image.so') if s else '')"
      OUTPUT_VARIABLE said ERROR_VARIABLE error RESULT_VARIABLE status OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(status)
      set(${why} "${Python_EXECUTABLE} finds no torch: give -DTORCH_DIR=... or -DPython_EXECUTABLE=..." PARENT_SCOPE)
      return()
    endif()
    string(REPLACE "\n" ";" said "${said}")
    list(GET said 0 torch)
    list(LENGTH said n)
    if(n GREATER 1 AND NOT codec)
      list(GET said 1 codec)
    endif()
  endif()
  if(NOT EXISTS ${torch}/include/torch/script.h)
    set(${why} "${torch} holds no include/torch/script.h: -DTORCH_DIR must name a libtorch or an installed torch package" PARENT_SCOPE)
    return()
  endif()
  message(STATUS "libtorch: ${torch}")
  message(STATUS "torchcodec image operators: ${codec}")
  set(TORCH_DIR "${torch}" PARENT_SCOPE)
  set(TORCHCODEC_IMAGE "${codec}" PARENT_SCOPE)
  set(${found} TRUE PARENT_SCOPE)
endfunction()

# torchcodec's wheel of PyPI links CUDA's libraries, though nothing of them is called for an image that is decoded on the CPU. Beside
# a libtorch without CUDA the loader is content with stand-ins of the same names, whose three functions fail: made here, in `folder`.
function(mmembed_cuda_stand_ins folder)
  set(${folder} "" PARENT_SCOPE)
  if(NOT TORCHCODEC_IMAGE OR NOT EXISTS "${TORCHCODEC_IMAGE}" OR EXISTS "${TORCH_DIR}/lib/libtorch_cuda.so" OR NOT CMAKE_READELF)
    return()
  endif()
  execute_process(COMMAND ${CMAKE_READELF} -d ${TORCHCODEC_IMAGE} OUTPUT_VARIABLE needed)
  string(REGEX MATCHALL "lib(nvrtc|cudart|c10_cuda|torch_cuda)\\.so[.0-9]*" names "${needed}")
  if(NOT names)
    return()
  endif()
  set(made "${CMAKE_BINARY_DIR}/mmembed_cuda_stand_ins")
  file(WRITE ${made}/source/failing.cpp "extern \"C\" {
int cudaGetDevice(int*) { return 100; }          // cudaErrorNoDevice
int cudaStreamSynchronize(void*) { return 100; }
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
}
")
  foreach(name ${names})
    file(WRITE ${made}/source/${name}.map "${name} { global: *; };\n")  # the version that the wheel's symbols ask for
    execute_process(
      COMMAND ${CMAKE_CXX_COMPILER} -shared -fPIC -nostdlib -Wl,-soname,${name} -Wl,--version-script=${made}/source/${name}.map
              -o ${made}/${name} ${made}/source/failing.cpp
      RESULT_VARIABLE status ERROR_VARIABLE error)
    if(status)
      message(WARNING "no stand-in for ${name}: ${error}")
      return()
    endif()
  endforeach()
  message(STATUS "libtorch without CUDA: stand-ins for torchcodec's ${names}")
  set(${folder} "${made}" PARENT_SCOPE)
endfunction()

# What a program that includes mmembed.hpp compiles and links with.
function(mmembed_use_libtorch target)
  target_include_directories(${target} SYSTEM INTERFACE ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
  target_link_directories(${target} INTERFACE ${TORCH_DIR}/lib)
  # Not libtorch.so: that of a CUDA build pulls in libtorch_cuda.so, half a second and 300 MB that a CPU host does without.
  target_link_libraries(${target} INTERFACE torch_cpu c10 Threads::Threads ${CMAKE_DL_LIBS})
  target_link_options(${target} INTERFACE -Wl,-rpath,${TORCH_DIR}/lib)
  target_compile_features(${target} INTERFACE cxx_std_20)
  if(TORCHCODEC_IMAGE)
    target_compile_definitions(${target} INTERFACE MMEMBED_TORCHCODEC_IMAGE="${TORCHCODEC_IMAGE}")
    mmembed_cuda_stand_ins(stand_ins)
    if(stand_ins)
      target_compile_definitions(${target} INTERFACE MMEMBED_CUDA_STAND_INS="${stand_ins}")
    endif()
  endif()
endfunction()
