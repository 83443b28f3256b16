room_test(conductor_link_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/conductor_link_test.cc DEPS rpc grpc)
