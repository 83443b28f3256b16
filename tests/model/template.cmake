# Chat templates. antiphon_render is the program of templates_vs_jinja2.py, not installed.
add_executable(antiphon_render render_main.cc)
target_link_libraries(antiphon_render PRIVATE antiphon_options antiphon_model)

room_test(template_language_test SOURCES template_language_test.cc DEPS model PURE)
room_test(template_limits_test SOURCES template_limits_test.cc DEPS model PURE)
room_fuzz(fuzz_template SOURCES fuzz_template.cc DEPS model)

add_test(NAME templates_vs_jinja2
         COMMAND ${CMAKE_COMMAND} -E env TZ=UTC sh -c
                 "test -n \"$ANTIPHON_PYTHON\" || exit 77; exec \"$ANTIPHON_PYTHON\" \"$@\"" sh
                 ${CMAKE_CURRENT_SOURCE_DIR}/templates_vs_jinja2.py
                 --render $<TARGET_FILE:antiphon_render> --cache ${CMAKE_SOURCE_DIR}/build/cache)
set_tests_properties(templates_vs_jinja2 PROPERTIES LABELS e2e TIMEOUT 600 SKIP_RETURN_CODE 77)
