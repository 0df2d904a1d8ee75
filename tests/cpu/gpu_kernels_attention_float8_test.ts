/** Tiles of float8 attention, and float8's fallbacks, on the emulated GPU. */
import { attentionFloat8Suite } from "../support/kernel_suites/attention_float8.ts";

attentionFloat8Suite();
