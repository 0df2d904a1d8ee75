/** Portable attention by AMD's matrix units, on the emulated AMD GPU. */
import { portableAttentionSuite } from "../support/kernel_suites/portable_attention.ts";

portableAttentionSuite();
