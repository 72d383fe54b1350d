// torch without CUDA has not been configured for it, and lacks this header.
#pragma once
