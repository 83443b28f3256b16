#include <boost/json/src.hpp>  // the one translation unit that compiles Boost.JSON
