/** Checksums on the emulated GPU. */
import { checksumProperties, checksumSuite } from "../support/kernel_suites/checksum.ts";

checksumSuite();
checksumProperties();
