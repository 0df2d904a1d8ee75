/** The relative change of a tensor on the emulated GPU. */
import { relativeChangeSuite } from "../support/kernel_suites/relative_change.ts";

relativeChangeSuite();
