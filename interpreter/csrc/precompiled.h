// What most files of the library include, compiled once (setup.py): without it a file takes 1.3 s longer. Each includes
// what it needs all the same.
#include "core.h"
#include "rows/lanewise.h"
