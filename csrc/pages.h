// Large fresh memory is handed out in pages of 4 KiB, each cleared by the kernel at its first touch. Where whole pages
// of 2 MiB are to be had on request, that costs a fraction.
#pragma once

#include <cstddef>

namespace moe_dist {
namespace cpu {

// Asks for large pages inside [data, data + bytes). Advice: nothing depends on whether it is followed.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace cpu
}  // namespace moe_dist
