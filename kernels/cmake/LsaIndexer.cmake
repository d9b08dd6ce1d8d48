# liblsa_indexer.so and what finds it: lsa_indexer.pc, lsa_indexerConfig.cmake. Only lsa_indexer.h is installed:
# the other headers name files of this tree.
file(STRINGS ${PROJECT_SOURCE_DIR}/export/abi/lsa_indexer.h abi REGEX "^#define LSA_IDX_ABI ")
string(REGEX REPLACE "^#define LSA_IDX_ABI +([0-9]+).*" "\\1" abi "${abi}")
add_library(lsa_indexer SHARED $<TARGET_OBJECTS:lsa_abi>)
target_link_libraries(lsa_indexer PRIVATE lsa_data)
target_link_options(lsa_indexer PRIVATE -Wl,--exclude-libs,ALL -Wl,-z,defs)
target_include_directories(lsa_indexer INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/lsa>)
set_target_properties(lsa_indexer PROPERTIES VERSION ${abi}.${PROJECT_VERSION} SOVERSION ${abi} LINKER_LANGUAGE C
  LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/lib)
if(LSA_SANITIZE)
  set_target_properties(lsa_indexer PROPERTIES LINK_OPTIONS "-Wl,--exclude-libs,ALL") # the sanitizer is the program's
endif()

install(TARGETS lsa_indexer EXPORT lsa_indexer LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${PROJECT_SOURCE_DIR}/export/abi/lsa_indexer.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/lsa)
set(to ${CMAKE_INSTALL_LIBDIR}/cmake/lsa_indexer)
install(EXPORT lsa_indexer FILE lsa_indexerConfig.cmake NAMESPACE lsa:: DESTINATION ${to})
include(CMakePackageConfigHelpers)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/lsa_indexerConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/lsa_indexerConfigVersion.cmake DESTINATION ${to})
# Paths from the file's own place, so that the prefix may be chosen, or moved, after configuring.
file(RELATIVE_PATH LSA_PC_PREFIX /p/${CMAKE_INSTALL_LIBDIR}/pkgconfig /p)
configure_file(${PROJECT_SOURCE_DIR}/export/abi/lsa_indexer.pc.in ${PROJECT_BINARY_DIR}/lsa_indexer.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/lsa_indexer.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
