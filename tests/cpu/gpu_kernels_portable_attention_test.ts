/** Portable attention without matrix units, on the emulated GPU. */
import { portableAttentionSuite } from "../support/kernel_suites/portable_attention.ts";

portableAttentionSuite();
