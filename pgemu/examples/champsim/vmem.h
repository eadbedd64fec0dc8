/* ChampSim's VirtualMemory over page tables of pgemu; takes the place of inc/vmem.h. See README.md beside it. */
#ifndef VMEM_H
#define VMEM_H

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "address.h"
#include "champsim.h"
#include "chrono.h"
#include "pgemu_shared.h"

class MEMORY_CONTROLLER;

using pte_entry = champsim::data::size<long long, std::ratio<8>>;

class VirtualMemory
{
  pgemu_shared shared{};
  pgemu_shared_format format{};
  int to_owner = -1, from_owner = -1;
  long owner = -1;
  std::string name;
  std::size_t touched = 0, walks = 0;
  std::size_t leaves[4] = {};

  void start_owner();
  uint64_t root_of(uint32_t cpu_num) const;
  /* Walk an address; maps its page where nothing is mapped, which `fault` tells. */
  pgemu_shared_walked walk(uint32_t cpu_num, champsim::page_number vaddr, bool& fault);

public:
  const champsim::chrono::clock::duration minor_fault_penalty;
  const std::size_t pt_levels;
  const pte_entry pte_page_size;

  VirtualMemory(champsim::data::bytes page_table_page_size, std::size_t page_table_levels, champsim::chrono::clock::duration minor_penalty,
                MEMORY_CONTROLLER& dram_);
  VirtualMemory(champsim::data::bytes page_table_page_size, std::size_t page_table_levels, champsim::chrono::clock::duration minor_penalty,
                MEMORY_CONTROLLER& dram_, std::optional<uint64_t> randomization_seed_);
  VirtualMemory(const VirtualMemory&) = delete;
  VirtualMemory& operator=(const VirtualMemory&) = delete;
  ~VirtualMemory();

  [[nodiscard]] champsim::data::bits shamt(std::size_t level) const;
  [[nodiscard]] champsim::dynamic_extent extent(std::size_t level) const;
  [[nodiscard]] uint64_t get_offset(champsim::address vaddr, std::size_t level) const;
  [[nodiscard]] uint64_t get_offset(champsim::page_number vaddr, std::size_t level) const;

  /* Pages of 4K of guest memory that no fault has asked for. */
  [[nodiscard]] std::size_t available_ppages() const;

  /* The physical page of a virtual one, and the latency of a fault that mapped it here. */
  std::pair<champsim::page_number, champsim::chrono::clock::duration> va_to_pa(uint32_t cpu_num, champsim::page_number vaddr);

  /* The physical address of the entry of a level; below a large leaf that leaf's again. */
  std::pair<champsim::address, champsim::chrono::clock::duration> get_pte_pa(uint32_t cpu_num, champsim::page_number vaddr, std::size_t level);
};

#endif
