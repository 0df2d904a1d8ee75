/** What surrounds FlashAttention-3, on the emulated GPU, which attends in its place. */
import { flashAttention3Suite } from "../support/kernel_suites/flash_attention3.ts";

flashAttention3Suite();
