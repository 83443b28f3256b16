// Links a whole room with the dependencies that it declares (room_library in cmake/Antiphon.cmake).
int main() { return 0; }
