// Boost.JSON without its shared library.
#include <boost/json/src.hpp>
